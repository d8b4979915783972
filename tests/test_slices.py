"""One quantity of an output does not excuse another: in each layout, in each precision, for each way to be wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from polyexport import Tolerance
from polyexport.capture.flatten import as_call, as_runner, flat, to_arrays
from polyexport.measure.noise import rounding
from polyexport.measure.parity import TIES, Parity, compare
from polyexport.spec import PRECISIONS


def detector(rows: int, classes: int = 5) -> np.ndarray:
    """Boxes in pixels beside scores: `(rows, 32, 4 + classes)`."""
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 640, (rows, 32, 4)), 1 / (1 + np.exp(-4 * rng.normal(size=(rows, 32, classes))))
    return np.concatenate([boxes, scores], -1).astype(np.float32)


def beside(greatest: float, *shape: int) -> np.ndarray:
    """A quantity up to `greatest` beside one up to 1, along a new last axis."""
    rng = np.random.default_rng(0)
    pair = [rng.uniform(greatest / 3, greatest, shape), rng.uniform(0.1, 1, shape)]
    return np.stack(pair, -1).astype(np.float32)


LAYOUTS = {
    "(N, A, 4 + C)": (detector(2), -1),
    "(N, 4 + C, A)": (detector(2).transpose(0, 2, 1), 1),
    "(A, 4 + C)": (detector(1)[0], 1),
    "(4 + C, A)": (detector(1)[0].T, 0),
    "(N, F)": (beside(3e4, 8), 1),
    "(N, F), scales not far apart": (beside(40, 16), 1),
    "(1, F)": (beside(3e4, 1), 1),
    "(F,)": (beside(3e4), 0),
    "(N, L, F)": (beside(3e4, 3, 7), 2),
    "(N, C, H, W)": (np.moveaxis(beside(80, 2, 8, 8), -1, 1), 1),
    "(N, A, K, F)": (beside(640, 2, 5, 17), 3),
    "a thousand classes": (detector(2, 1000), -1),
    "a small quantity": (beside(1, 16) * np.array([1, 1e-6], np.float32), 1),
}


def judged(actual: np.ndarray, reference: np.ndarray, precision: str, noise: np.ndarray | None = None) -> Parity:
    known = {} if noise is None else {"y": noise}
    return compare({"y": actual}, {"y": reference}, Tolerance.for_precision(precision), known)


def rounded(reference: np.ndarray, precision: str, axis: int) -> np.ndarray:
    """What an artifact of that precision can answer at its best."""
    rng = np.random.default_rng(1)
    if precision == "float16":
        return reference.astype(np.float16).astype(np.float32)
    if precision in ("int8", "w8"):
        rest = tuple(other for other in range(reference.ndim) if other != axis % reference.ndim)
        step = np.abs(reference).max(axis=rest, keepdims=True) / 127
        return (np.round(reference / step) * step).astype(np.float32)
    relative = {"float32": 1e-6, "bfloat16": 2.0**-8, "w4": 1 / 30}[precision]
    return (reference * (1 + relative * rng.uniform(-1, 1, reference.shape))).astype(np.float32)


def wrong(reference: np.ndarray, how: str, axis: int) -> np.ndarray:
    """With the last slice of the features' axis wrong."""
    answer = reference.copy()
    features = np.moveaxis(answer, axis, -1)
    if how == "zeroed":
        features[..., -1] = 0
    elif how == "constant":
        features[..., -1] = features[..., -1].mean()
    elif how == "halved":
        features[..., -1] /= 2
    elif how == "negated":
        features[..., -1] *= -1
    return answer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_rounded_agrees_and_one_wrong_column_does_not(layout, precision):
    reference, axis = LAYOUTS[layout]
    parity = judged(rounded(reference, precision, axis), reference, precision)
    assert parity.passed, parity.reason
    for how in ("zeroed", "constant", "halved", "negated"):
        answer = wrong(reference, how, axis)
        if not np.array_equal(answer, reference):  # of one row each column is constant
            assert not judged(answer, reference, precision).passed, how


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_wrong_column_is_named(precision):
    for layout in ("(N, A, 4 + C)", "(N, 4 + C, A)"):
        reference, axis = LAYOUTS[layout]
        reason = judged(wrong(reference, "zeroed", axis), reference, precision).reason
        assert f"in column 8 of axis {axis % 3}" in reason
        assert "at a scale of 1" in reason


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_swapped_columns_do_not_agree(precision):
    reference, _ = LAYOUTS["(N, A, 4 + C)"]
    assert not judged(reference[..., [0, 1, 2, 3, 5, 4, 6, 7, 8]], reference, precision).passed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_int8_steps_of_the_whole_output_are_a_mismatch_where_they_swallow_a_column(precision):
    reference, _ = LAYOUTS["(N, A, 4 + C)"]
    step = np.float32(640 / 127)
    parity = judged(np.round(reference / step) * step, reference, precision)
    assert not parity.passed
    assert "column" in parity.reason


def logits(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a random layer, and what float32 sums do to them: all columns have their terms in common."""
    rng = np.random.default_rng(2)
    hidden, weights = rng.normal(size=(rows, 256)), rng.normal(size=(256, columns))
    exact = hidden @ weights
    return exact, np.abs((hidden.astype(np.float32) @ weights.astype(np.float32)) - exact)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (4, 1000), (4, 10), (64, 10), (8, 1)])
def test_elements_near_zero_may_be_as_far_off_as_rounding_alone_moves_them(rows, columns):
    """Each precision rounds the terms of a sum, and where they cancel nothing else is left."""
    exact, noise = logits(rows, columns)
    reference = exact.astype(np.float32)
    rng = np.random.default_rng(3)
    for precision, share in itertools.product(PRECISIONS, (1.0, 1e-2)):
        size = share * 16 * Tolerance.for_precision(precision).roundoff  # of the terms, which are about 1
        parity = judged((exact + size * rng.normal(size=exact.shape)).astype(np.float32), reference, precision, noise)
        assert parity.passed, (precision, parity.reason)


def test_a_column_of_rounding_noise_is_held_to_its_noise_floor():
    """Such as the mean of what was normalized: zero, as far as the precision goes."""
    rng = np.random.default_rng(0)
    noise = 1e-7 * np.abs(rng.normal(size=(16, 2)))
    reference = np.stack([rng.normal(size=16), 1e-7 * rng.normal(size=16)], 1).astype(np.float32)
    other = reference + np.array([0, 1e-7], np.float32) * rng.normal(size=(16, 2)).astype(np.float32)
    assert judged(other, reference, "float32", noise).passed
    assert not judged(other, reference, "float32", np.array([1, 1e-4]) * noise).passed
    assert not judged(reference + np.array([0, 1e-5], np.float32), reference, "float32", noise).passed


def test_the_noise_floor_grows_with_the_numbers_of_another_batch():
    whole = np.random.default_rng(0).uniform(3, 5, (4, 1, 6, 6)).astype(np.float32)
    whole[:, 0, 2, 3] = 1e-4  # next to nothing in every row, as where large numbers cancel
    noise, limits = {"y": np.full(whole.shape, 1e-6)}, Tolerance.for_precision("float32")
    wrong = np.zeros_like(whole)
    wrong[:, 0, 2, 3] = 1e-4
    for factor, error, passes in ((1, 1, False), (100, 1, True), (100, 100, False)):
        batch = {"y": whole * np.float32(factor)}
        found = compare({"y": batch["y"] + wrong * np.float32(error)}, batch, limits, noise, {"y": whole})
        assert found.passed == passes, (factor, error)


def test_a_column_of_zeros_is_judged_by_the_scale_of_the_output():
    """What a ReLU cuts off here may be just above zero there."""
    reference = np.array([[1, 0], [2, 0]], np.float32)
    assert judged(reference + np.array([0, 1e-5], np.float32), reference, "float32").passed
    assert not judged(reference + np.array([0, 1e-3], np.float32), reference, "float32").passed


class MaskedAttention(nn.Module):
    """With a float32 mask that forward makes, whatever the module's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.linspace(-3, 3, x.shape[1] ** 2).reshape(x.shape[1], x.shape[1])
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class FixedDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.constant = nn.Linear(16, 4), torch.ones(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.constant


@pytest.mark.parametrize(("module", "note"), [(MaskedAttention, ""), (FixedDtype, "does not run in float64")])
def test_the_noise_floor_is_what_rounding_does_and_leaves_the_module_as_it_was(module, note):
    torch.manual_seed(0)
    wrapped = flat(module().eval(), *as_call(torch.randn(2, 64, 16)))
    inputs = to_arrays(wrapped.input_names, wrapped.example)
    outputs = as_runner(wrapped)(inputs)
    noise, told = rounding(wrapped, inputs, outputs)
    assert 0 < noise["output_0"].max() < 1e-5
    assert noise["output_0"].shape == outputs["output_0"].shape
    assert note in told
    assert np.array_equal(as_runner(wrapped)(inputs)["output_0"], outputs["output_0"])


class Tied(nn.Module):
    """Two classes whose logits are the same number on two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(16, 1)), nn.Parameter(torch.ones(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ self.one, x @ self.other, 0 * x[:, :1] + 0.5], 1).argmax(1)


def test_a_tie_is_what_rounding_alone_decides():
    """Rows of which the tied classes are the greatest, and rows of which they are not."""
    rows = torch.rand(80, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    rows[40:] *= -1
    wrapped = flat(Tied().eval(), *as_call(rows))
    inputs = to_arrays(wrapped.input_names, wrapped.example)
    outputs = as_runner(wrapped)(inputs)
    noise, _ = rounding(wrapped, inputs, outputs)
    assert noise["output_0"][:40].any()
    assert not noise["output_0"][40:].any()
    ties = noise[f"output_0{TIES}"]
    assert np.isfinite(ties[:40]).all()
    assert np.isinf(ties[40:]).all()
