"""A training loop with Lightning Fabric that offers each new best checkpoint to a session, which exports it meanwhile.

python examples/fabric.py
"""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyexport import FORMATS, Checkpoint, Options, Session
from polyexport.report.console import show

RUN = Path("runs/fabric")


def loaders(fabric: Fabric) -> list[DataLoader]:
    """Digits of 8 by 8 pixels to train on, and others to validate on."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target))
    training, validation = torch.utils.data.random_split(data, [1500, len(data) - 1500])
    return list(fabric.setup_dataloaders(DataLoader(training, 32, shuffle=True), DataLoader(validation, 32)))


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    losses = [nn.functional.cross_entropy(model(images), labels) for images, labels in loader]
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    training, validation = loaders(fabric)
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=1e-3))

    with Session(Options((FORMATS["torchscript"], FORMATS["onnx"])), RUN / "exports") as session:
        session.install()
        images, _ = next(iter(validation))
        session.take(network, (images,), {})  # what forward receives: the artifacts are verified with it

        best = float("inf")
        for epoch in range(5):
            for images, labels in training:
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
            loss = validate(model, validation)
            if loss < best:
                best, path = loss, RUN / f"epoch={epoch}.ckpt"
                fabric.save(path, {"state_dict": network.state_dict()})
                session.offer(
                    network, str(path), path.stem, Checkpoint(str(path), epoch=epoch, monitor="loss", score=loss)
                )

        show(session.finish()[-1])


if __name__ == "__main__":
    main()
