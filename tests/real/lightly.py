"""lightly: SimCLR, two views of each image through a backbone and a projection head."""

from __future__ import annotations

import torch

import environments
from real.training import VERIFIED, Task, fit, loader, main

REQUIREMENTS = ("lightly", environments.TORCHVISION)
STATES = VERIFIED


def train(callback):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from torchvision.models import resnet18

    class SimCLR(Task):
        def answer(self, batch):
            return NTXentLoss()(self(batch), self(batch + 0.1 * torch.randn_like(batch)))

    backbone = torch.nn.Sequential(*list(resnet18().children())[:-1], torch.nn.Flatten())
    network = torch.nn.Sequential(backbone, SimCLRProjectionHead(512, 32, 16))
    fit(SimCLR(network), loader(torch.randn(12, 3, 32, 32)), callback)


if __name__ == "__main__":
    main(train)
