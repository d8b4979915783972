"""Bytes in, labels out: train on raw pictures, and export artifacts that an application can use as they are.

python examples/hand_over.py

Where the artifacts can be used then:

* a web page: serve this folder (python -m http.server), then choose runs/hand_over/picture.bmp in
  http://localhost:8000/examples/hand_over.html?model=/runs/hand_over/exports/best/tfjs/model.json
* a machine that has only the runtime: polyexport kit runs/hand_over/exports/best/onnx
* a server: see serve_triton.py

Formats given as arguments, such as `onnx tfjs`, replace the list below.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_export import ExportCallback, TritonRepository

FOLDER = Path("runs/hand_over")
FORMATS = ["torchscript", "onnx", "openvino", "coreml", "tflite", "tfjs"]
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Pixels(nn.Module):
    """Pictures from a decoder, bytes of (N, 32, 32, 3), to the input that the network is trained on."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        grey = pixels.permute(0, 3, 1, 2).float().mean(1, keepdim=True) / 255
        return (functional.interpolate(grey, size=(8, 8), mode="bilinear", align_corners=False) - 0.3) / 0.4


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = Pixels()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)

    def training_step(self, batch, batch_idx):
        pixels, digit = batch
        return functional.cross_entropy(self(self.pixels(pixels)), digit)

    def validation_step(self, batch, batch_idx):
        pixels, digit = batch
        self.log("val_loss", functional.cross_entropy(self(self.pixels(pixels)), digit))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Digits as 32x32 color pictures, and their classes."""
    digits = load_digits()
    grey = np.kron(np.minimum(digits.images * 16, 255), np.ones((4, 4))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), digits.target


def write_bmp(path: Path, picture: np.ndarray) -> None:
    """Write bytes of (height, width, 3), RGB, as a BMP file."""
    height, width, _ = picture.shape
    fields = (54 + picture.size, 0, 54, 40, width, -height)
    head = b"BM" + np.array(fields, "<i4").tobytes() + np.array([1, 24], "<u2").tobytes() + bytes(24)
    path.write_bytes(head + picture[..., ::-1].tobytes())


def main() -> None:
    seed_everything(1)
    raw, target = pictures()
    data = TensorDataset(torch.from_numpy(raw), torch.from_numpy(target))
    train, validation = random_split(data, [0.8, 0.2])
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        default_root_dir=FOLDER,
        callbacks=[
            ModelCheckpoint(monitor="val_loss"),
            ExportCallback(
                formats=sys.argv[1:] or FORMATS,
                when="fit_end",
                preprocess="pixels",
                postprocess=nn.Softmax(dim=1),
                labels=LABELS,
                bench=False,
                publish=[TritonRepository(FOLDER / "models", name="digits")],
            ),
        ],
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=64))
    write_bmp(FOLDER / "picture.bmp", raw[validation.indices[0]])
    print(f"picture.bmp shows a {LABELS[target[validation.indices[0]]]}")


if __name__ == "__main__":
    main()
