"""neuralforecast: N-HiTS, fitted by the package, which makes the trainer and keeps its callbacks in the model."""

from __future__ import annotations

import sys

from real.training import VERIFIED, main, settings

REQUIREMENTS = ("neuralforecast",)
STATES = VERIFIED


def train(callback):
    import numpy
    import pandas
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS
    from pytorch_lightning.callbacks import ModelCheckpoint  # its trainer's

    series = pandas.DataFrame(
        {
            "unique_id": numpy.repeat(["a", "b", "c", "d"], 60),
            "ds": numpy.tile(numpy.arange(60), 4),
            "y": numpy.sin(numpy.arange(240) / 5.0),
        }
    )
    given = settings(callback) | {"callbacks": [callback, ModelCheckpoint(sys.argv[1], monitor="ptl/val_loss")]}
    for ours in ("max_epochs", "limit_train_batches", "limit_val_batches"):  # it counts in steps
        del given[ours]
    model = NHITS(
        h=4, input_size=12, max_steps=4, val_check_steps=2, mlp_units=3 * [[16, 16]], enable_checkpointing=True, **given
    )
    NeuralForecast(models=[model], freq=1).fit(series, val_size=8)


if __name__ == "__main__":
    main(train)
