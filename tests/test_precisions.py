"""Every lower precision of a format, beside the format in float32."""

from __future__ import annotations

import pytest

from every_format import Everything
from polyexport import FORMATS
from polyexport.spec import Precision

AT_MOST: dict[Precision, float] = {"float16": 0.6, "int8": 0.4, "w8": 0.4, "w4": 0.3}
"""The share of the float32 artifact's bytes that one in this precision takes."""


def _float32(name: str) -> str:
    """The format in float32 whose name this one's begins with; empty where there is none."""
    base = name.rpartition("-")[0]
    return base if base in FORMATS and FORMATS[base].precision == "float32" else ""


LOWER = [name for name, each in FORMATS.items() if each.precision in AT_MOST and _float32(name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOWER)
def test_a_lower_precision_agrees_and_takes_less_disk(everything: Everything, name: str) -> None:
    made = {outcome.format: outcome for outcome in everything.report.outcomes}
    if name not in made:
        pytest.skip(FORMATS[name].lacks() or f"{name} needs a GPU")
    assert (made[name].state, made[name].reason) == ("verified", "")
    small, large = made[name].artifact, made[_float32(name)].artifact
    assert small is not None
    assert large is not None
    assert small.bytes <= AT_MOST[FORMATS[name].precision] * large.bytes
