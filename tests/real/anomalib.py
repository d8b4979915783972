"""anomalib: PaDiM over images in folders; the package's engine makes the trainer, and scores are scaled in forward."""

from __future__ import annotations

import sys
from pathlib import Path

import environments
from real.training import VERIFIED, main

REQUIREMENTS = ("anomalib", environments.TORCHVISION)
STATES = VERIFIED


def image(batch):
    return batch.image


def train(callback):
    import numpy
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Padim
    from PIL import Image

    root, random = Path(sys.argv[1], "images"), numpy.random.default_rng(0)
    for kind in ("good", "bad"):
        (root / kind).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(random.integers(0, 255, (64, 64, 3), "uint8")).save(root / kind / f"{index}.png")
    data = Folder("made", "good", root, "bad", train_batch_size=4, eval_batch_size=4, num_workers=0)
    model = Padim(
        pre_trained=False,
        layers=["layer1"],
        n_features=8,
        visualizer=False,
        pre_processor=Padim.configure_pre_processor(image_size=(64, 64)),
    )
    Engine(callbacks=[callback], logger=False, accelerator="cpu", default_root_dir=sys.argv[1]).fit(model, data)


if __name__ == "__main__":
    main(train, inputs=image)
