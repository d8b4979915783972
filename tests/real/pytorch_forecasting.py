"""pytorch-forecasting: a temporal fusion transformer over series of equal length."""

from __future__ import annotations

from real.training import VERIFIED, fit, main

REQUIREMENTS = ("pytorch-forecasting",)
STATES = {name: "degraded" for name in VERIFIED} | {"pt2": "failed", "openvino": "failed"}
"""Its forward and its LSTM ask lengths for their maximum and whether any is zero: a trace keeps one answer."""


def train(callback):
    import numpy
    import pandas
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    series = pandas.DataFrame(
        {
            "series": numpy.repeat(["a", "b", "c", "d"], 30),
            "step": numpy.tile(numpy.arange(30), 4),
            "value": numpy.sin(numpy.arange(120) / 5.0).astype("float32"),
        }
    )
    data = TimeSeriesDataSet(
        series,
        time_idx="step",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["step"],
    )
    model = TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, log_interval=0
    )
    fit(model, data.to_dataloader(train=False, batch_size=4, num_workers=0), callback)


if __name__ == "__main__":
    main(train)
