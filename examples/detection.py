"""Train a small detector, which returns a dict of boxes and scores, and export each new best checkpoint during `fit`.

python examples/detection.py

Each image shows one bright rectangle on noise. It prints a line for each finished format, then the table of the best
checkpoint, then what its ONNX file finds in a new image. Formats given as arguments, such as `tfjs`, replace OpenVINO.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import polyexport
from lightning_export import ExportCallback

SIDE, CELLS = 32, 4  # side of the image in pixels, and cells per side of the grid; each cell predicts one box


class Detector(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 16), (16, 32), (32, 64))]
        self.body = nn.Sequential(*(part for layer in layers for part in layer), nn.Conv2d(64, 5, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        score, box = self.body(image).flatten(2).transpose(1, 2).split((1, 4), -1)
        return {"boxes": box.sigmoid() * SIDE, "scores": score.squeeze(-1).sigmoid()}

    def training_step(self, batch, batch_idx):
        image, box, cell = batch
        found = self(image)
        off = functional.l1_loss(found["boxes"][torch.arange(len(cell)), cell], box) / SIDE
        return off + functional.binary_cross_entropy(found["scores"], functional.one_hot(cell, CELLS**2).float())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def scenes(count: int) -> TensorDataset:
    """Images, the box (left, top, right, bottom) of the rectangle, and the grid cell that contains its center."""
    size = torch.randint(8, 17, (count, 2))
    start = (torch.rand(count, 2) * (SIDE - size)).long()
    pixel = torch.arange(SIDE).expand(2, -1)
    across, down = ((pixel >= start[..., None]) & (pixel < (start + size)[..., None])).unbind(1)
    image = 0.3 * torch.rand(count, 3, SIDE, SIDE) + 0.7 * (down[:, None, :, None] & across[:, None, None, :])
    column, row = ((start + size / 2) * CELLS / SIDE).long().unbind(1)
    return TensorDataset(image, torch.cat([start, start + size], 1).float(), row * CELLS + column)


def main() -> None:
    seed_everything(1)
    export = ExportCallback(["onnx", *(sys.argv[1:] or ["openvino"])], bench=False)
    callbacks = [ModelCheckpoint(monitor="val_loss"), export]
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, default_root_dir="runs/detection", callbacks=callbacks
    )
    trainer.fit(Detector(), DataLoader(scenes(4096), 64), DataLoader(scenes(256), 64))

    run = polyexport.load(export.reports[-1].folder / "onnx")
    image, box, _ = scenes(1)[:]
    found = run({"image": image.numpy()})
    print(f"rectangle: {box[0].int().tolist()}")
    print(f"found:     {found['boxes'][0, found['scores'].argmax()].round().astype(int).tolist()}")


if __name__ == "__main__":
    main()
