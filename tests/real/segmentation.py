"""segmentation-models-pytorch: a U-Net over a ResNet."""

from __future__ import annotations

import torch

import environments
from real.training import VERIFIED, Task, fit, loader, main

REQUIREMENTS = ("segmentation-models-pytorch", "timm==1.0.31", environments.TORCHVISION)
STATES = VERIFIED


def train(callback):
    import segmentation_models_pytorch as smp

    network = smp.Unet("resnet18", encoder_weights=None, classes=3)
    fit(Task(network), loader(torch.randn(12, 3, 64, 64)), callback)


if __name__ == "__main__":
    main(train)
