"""Train a small CNN on scikit-learn's handwritten digits and export the best checkpoint, in every format.

python examples/digits.py

Formats given as arguments, such as `onnx tflite`, replace the list below.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_export import ExportCallback

FORMATS = [
    "torchscript",
    "onnx",
    "openvino",
    "tensorrt",
    "coreml",
    "saved_model",
    "graphdef",
    "tflite",
    "edgetpu",
    "tfjs",
    "paddle",
    "pt2",
    "tflite-int8",
]
"""The eleven that most people ask for, and two more; `polyexport formats` lists them all."""


def block(channels: int, wider: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU())


class Digits(LightningModule):
    """A convolutional classifier of 8x8 gray images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            block(1, 32),
            nn.MaxPool2d(2),
            block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(image)}

    def training_step(self, batch, batch_idx):
        image, digit = batch
        return functional.cross_entropy(self(image)["logits"], digit)

    def validation_step(self, batch, batch_idx):
        image, digit = batch
        logits = self(image)["logits"]
        self.log("val_loss", functional.cross_entropy(logits, digit), sync_dist=True)
        self.log("val_acc", (logits.argmax(-1) == digit).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loaders() -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train, validation = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=64)


def main() -> None:
    seed_everything(1)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=WandbLogger(project="digits", save_dir="runs", offline=True),
        callbacks=[
            ModelCheckpoint(monitor="val_loss"),
            ExportCallback(formats=sys.argv[1:] or FORMATS, when="fit_end"),
        ],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), *loaders())


if __name__ == "__main__":
    main()
