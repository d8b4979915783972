"""MONAI: a three-dimensional U-Net, as medical images are segmented with."""

from __future__ import annotations

import torch

from real.training import VERIFIED, Task, fit, loader, main

REQUIREMENTS = ("monai",)
STATES = VERIFIED


def train(callback):
    from monai.networks.nets import UNet

    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)
    fit(Task(network), loader(torch.randn(12, 1, 16, 16, 16)), callback)


if __name__ == "__main__":
    main(train)
