"""Each check of `compare` passes on the right answer and fails on a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from polyexport import Tolerance
from polyexport.measure.parity import TIES, compare, merge, noise_floor, says_little

FLOAT32 = Tolerance.for_precision("float32")
INT8 = Tolerance.for_precision("int8")


@pytest.fixture
def reference() -> dict[str, np.ndarray]:
    return {"logits": np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)}


def test_equal_outputs_pass_with_no_error(reference):
    parity = compare({"logits": reference["logits"].copy()}, reference, FLOAT32)
    figures = parity.outputs["logits"]
    assert parity.passed
    assert (figures.max_abs_error, figures.misses, figures.top1, figures.snr_db) == (0.0, 0.0, 1.0, None)
    assert figures.cosine == pytest.approx(1.0)


def test_rounding_passes_and_its_figures_agree_with_numpy(reference):
    ref = reference["logits"]
    rounded = ref + np.float32(1e-6) * np.sign(ref)
    figures = compare({"logits": rounded}, reference, FLOAT32).outputs["logits"]
    error = rounded.astype(np.float64) - ref
    assert compare({"logits": rounded}, reference, FLOAT32).passed
    assert figures.max_abs_error == pytest.approx(np.abs(error).max())
    assert figures.snr_db == pytest.approx(10 * np.log10((ref.astype(np.float64) ** 2).sum() / (error**2).sum()))


def test_an_output_without_elements_is_judged_by_the_batches_that_have_some(reference):
    none = {"logits": reference["logits"][:0]}
    assert compare(none, none, FLOAT32).passed
    assert compare(reference, reference, FLOAT32, whole=none).passed
    assert not compare({"logits": -reference["logits"]}, reference, FLOAT32, whole=none).passed


def changed(logits: np.ndarray, where: Any, value: float) -> np.ndarray:
    logits = logits.copy()
    logits[where] = value
    return logits


SCALED = np.float32(1.01)

WRONG: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "a single flipped element": lambda right: {"logits": changed(right, (0, 3), -right[0, 3])},
    "NaN": lambda right: {"logits": changed(right, (2, 2), np.nan)},
    "infinity": lambda right: {"logits": changed(right, (2, 2), np.inf)},
    "zeros": lambda right: {"logits": np.zeros_like(right)},
    "scaled": lambda right: {"logits": right * SCALED},
    "wrong dtype": lambda right: {"logits": right.astype(np.float64)},
    "a shape that would broadcast": lambda right: {"logits": right[:1]},
    "a dropped axis of size one": lambda right: {"logits": right[:, :, None]},
    "missing output": lambda right: {},
    "surplus output": lambda right: {"logits": right, "more": right},
    "another name": lambda right: {"probabilities": right},
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_is_a_mismatch(reference, how):
    parity = compare(WRONG[how](reference["logits"]), reference, FLOAT32)
    assert not parity.passed
    assert parity.reason


def test_swapped_axes_of_a_square_are_a_mismatch(reference):
    square = reference["logits"][:, :8].copy()
    assert not compare({"logits": square.T.copy()}, {"logits": square}, FLOAT32).passed


def test_an_infinite_reference_wants_the_same_infinity(reference):
    reference["logits"][1, 1] = np.inf
    same = {"logits": reference["logits"].copy()}
    finite = {"logits": np.nan_to_num(reference["logits"], posinf=3e38)}
    negative = {"logits": np.where(np.isinf(reference["logits"]), -np.inf, reference["logits"])}
    assert compare(same, reference, FLOAT32).passed
    assert not compare(finite, reference, FLOAT32).passed
    assert not compare(negative, reference, FLOAT32).passed


def test_an_infinity_does_not_widen_the_limits_of_the_other_elements(reference):
    reference["logits"][1, 1] = np.inf
    given = reference["logits"].copy()
    given[0, 0] += 1
    assert not compare({"logits": given}, reference, FLOAT32).passed


def test_a_reference_with_nan_wants_nan_at_the_same_place(reference):
    reference["logits"][1, 1] = np.nan
    assert compare({"logits": reference["logits"].copy()}, reference, FLOAT32).passed
    assert not compare({"logits": np.nan_to_num(reference["logits"])}, reference, FLOAT32).passed


def test_integers_must_be_equal():
    labels = {"label": np.arange(20)}
    off_by_one = {"label": np.where(labels["label"] == 7, 8, labels["label"])}
    assert compare({"label": np.arange(20)}, labels, FLOAT32).passed
    assert not compare(off_by_one, labels, FLOAT32).passed
    assert not compare(off_by_one, labels, INT8).passed, "no precision excuses what no rounding moves"


def test_in_low_precision_integers_may_differ_where_its_rounding_moves_them():
    """Of 100 labels two are ties in int8; what was seen of them by few draws may be half."""
    labels = {"label": np.arange(100)}
    ties = np.where(np.isin(labels["label"], (3, 7)), INT8.roundoff, np.inf)
    known = {f"label{TIES}": ties}

    def differing(*at: int) -> dict[str, np.ndarray]:
        return {"label": np.where(np.isin(labels["label"], at), 0, labels["label"])}

    assert compare(differing(3, 7), labels, INT8, known).passed
    assert compare(differing(3, 50, 51, 52, 53), labels, INT8, known).passed, "twice as many as were seen"
    assert not compare(differing(50, 51, 52, 53, 54), labels, INT8, known).passed
    assert not compare(differing(3), labels, Tolerance.for_precision("float16"), known).passed, "moved by int8 only"
    figures = compare(differing(3, 50, 51, 52, 53, 54), labels, INT8, known)
    assert figures.reason == "label: 5.000% of the int64 elements differ, by up to 54"


def test_int8_is_judged_by_cosine_and_top1(reference):
    ref = reference["logits"]
    coarse = {"logits": (np.round(ref * 128) / 128).astype(np.float32)}
    noise = np.random.default_rng(1).normal(size=ref.shape).astype(np.float32)
    assert not compare(coarse, reference, FLOAT32).passed
    assert compare(coarse, reference, INT8).passed
    assert "cosine" in compare({"logits": ref + noise}, reference, INT8).reason


def test_top1_counts_a_tie_within_the_limits_as_agreement():
    reference = {"p": np.array([[0.5, 0.5000001, 0.1]], np.float32)}
    tied = {"p": np.array([[0.5000001, 0.5, 0.1]], np.float32)}
    changed = {"p": np.array([[0.5, 0.5, 0.6]], np.float32)}
    assert compare(tied, reference, FLOAT32).outputs["p"].top1 == 1.0
    assert compare(changed, reference, FLOAT32).outputs["p"].top1 == 0.0


def test_top1_fails_where_the_class_changes_though_cosine_is_high():
    reference = {"p": np.tile(np.array([10.0, 10.5, 10.2], np.float32), (50, 1))}
    given = {"p": np.tile(np.array([10.55, 10.5, 10.2], np.float32), (50, 1))}
    parity = compare(given, reference, INT8)
    assert not parity.passed
    assert "top-1" in parity.reason


def test_in_int8_two_elements_closer_than_a_step_are_a_tie():
    near = {"p": np.tile(np.array([1.0, 0.99, -1.0], np.float32), (20, 1))}
    far = {"p": np.tile(np.array([1.0, 0.9, -1.0], np.float32), (20, 1))}
    assert compare({"p": near["p"][:, [1, 0, 2]]}, near, INT8).passed
    assert "top-1" in compare({"p": far["p"][:, [1, 0, 2]]}, far, INT8).reason


def test_the_classes_of_an_image_are_its_channels():
    """Along a row of pixels many are alike, and which is the greatest of them says nothing."""
    flat = np.tile(np.array([3.0, -3.0], np.float32)[:, None, None], (4, 1, 8, 8))
    noise = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32) * 0.2
    assert compare({"mask": flat + noise}, {"mask": flat}, INT8).outputs["mask"].top1 == 1.0
    swapped = flat.copy()
    swapped[:, :, :1] = 0.03 * swapped[:, ::-1, :1]
    assert compare({"mask": swapped}, {"mask": flat}, INT8).outputs["mask"].top1 == pytest.approx(7 / 8)


def test_a_small_batch_may_lose_as_many_rows_as_the_whole():
    row = {"p": np.array([[2.0, 1.8, 0, 0]], np.float32)}
    other = {"p": np.array([[1.9, 2.0, 0, 0]], np.float32)}
    whole = {"p": np.tile(row["p"], (40, 1))}
    assert "top-1 agreement 0.00%" in compare(other, row, INT8).reason
    assert compare(other, row, INT8, whole=whole).passed
    assert "cosine" in compare({"p": row["p"][:, ::-1]}, row, INT8, whole=whole).reason
    labels = {"label": np.zeros((40, 2), np.int64)}  # of other rows, so that no tie is known of them
    seen = {f"label{TIES}": np.full((40, 2), INT8.roundoff)}
    one, three = {"label": np.zeros((1, 1), np.int64)}, {"label": np.zeros((3, 1), np.int64)}
    assert compare({"label": np.array([[1]])}, one, INT8, seen, whole=labels).passed
    assert not compare({"label": np.array([[1]])}, one, FLOAT32, seen, whole=labels).passed
    assert compare({"label": np.array([[1], [0], [0]])}, three, INT8, seen, whole=labels).passed
    assert not compare({"label": np.array([[1], [1], [0]])}, three, INT8, seen, whole=labels).passed, "more than half"


def test_a_small_batch_near_zero_is_judged_relative_to_the_whole():
    whole = {"distance": np.array([0.04, 1.1, 0.06, 0.9], np.float32)}
    row = {"distance": whole["distance"][:1]}
    rounded_away = {"distance": np.zeros(1, np.float32)}
    assert "cosine similarity 0.000000" in compare(rounded_away, row, INT8).reason
    assert compare(rounded_away, row, INT8, whole=whole).passed
    assert "cosine" in compare({"distance": np.array([0.9], np.float32)}, row, INT8, whole=whole).reason


def test_an_all_zero_reference_allows_rounding_but_no_answer():
    zeros = {"x": np.zeros((2, 3), np.float32)}
    assert compare({"x": np.zeros((2, 3), np.float32)}, zeros, FLOAT32).passed
    assert not compare({"x": np.full((2, 3), 1e-3, np.float32)}, zeros, FLOAT32).passed


def test_an_empty_output_is_compared_by_shape():
    empty = {"boxes": np.zeros((0, 4), np.float32)}
    assert compare({"boxes": np.zeros((0, 4), np.float32)}, empty, FLOAT32).passed
    assert not compare({"boxes": np.zeros((1, 4), np.float32)}, empty, FLOAT32).passed


def test_complex_outputs_are_compared_by_modulus():
    spectrum = {"f": np.fft.rfft(np.random.default_rng(0).normal(size=16)).astype(np.complex64)[None]}
    assert compare({"f": spectrum["f"].copy()}, spectrum, FLOAT32).passed
    assert not compare({"f": spectrum["f"].conj()}, spectrum, FLOAT32).passed


def test_one_failing_batch_size_fails_the_whole_and_is_named(reference):
    good = compare(reference, reference, FLOAT32)
    bad = compare(WRONG["scaled"](reference["logits"]), reference, FLOAT32)
    assert merge([good, good], [{"batch": 8}, {"batch": 1}]).passed
    merged = merge([good, good, bad], [{"batch": 8}, {"batch": 1}, {"batch": 3}])
    assert not merged.passed
    assert merged.reason.startswith("at batch=3:")


def test_the_noise_floor_is_the_distance_to_float64():
    high = {"x": np.array([1.0, 2.0]), "label": np.array([1])}
    low = {"x": np.array([1.0, 2.5], np.float32), "label": np.array([1])}
    found = noise_floor(low, high)
    assert found["x"].tolist() == [0.0, 0.5]
    assert found["label"].tolist() == [0.0]


def test_an_integer_that_depends_on_a_tie_may_be_either():
    reference = {"label": np.array([3, 5, 5, 2])}
    tie = {"label": np.array([0, 1, 0, 0])}
    other, wrong = {"label": np.array([3, 4, 5, 2])}, {"label": np.array([3, 5, 4, 2])}
    assert compare(other, reference, FLOAT32, tie).passed
    assert not compare(other, reference, FLOAT32).passed
    assert not compare(wrong, reference, FLOAT32, tie).passed
    assert not compare({"label": np.array([3, 9, 5, 2])}, reference, FLOAT32, tie).passed, "neither"
    rows = {"label": np.array([3, 4])}
    assert compare(rows, {"label": np.array([3, 5])}, FLOAT32, tie, whole=reference).passed


def test_an_output_in_half_precision_is_judged_as_such():
    half = {"y": np.random.default_rng(0).normal(size=(8, 10)).astype(np.float16)}
    rounded = {"y": (half["y"].astype(np.float32) * 1.004).astype(np.float16)}
    single = {"y": half["y"].astype(np.float32)}
    assert compare(rounded, half, FLOAT32).passed
    assert not compare({"y": single["y"] * np.float32(1.004)}, single, FLOAT32).passed
    assert not compare({"y": half["y"][::-1]}, half, FLOAT32).passed
    assert compare(rounded, half, INT8).passed


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((4, 3)), "agreement on y proves little: PyTorch itself returns 0.0 everywhere"),
        (np.ones(8, np.int64), "agreement on y proves little: PyTorch itself returns 1 everywhere"),
        (np.zeros(8, bool), "agreement on y proves little: PyTorch itself returns False everywhere"),
        (
            np.tile(np.arange(3.0), (8, 1)),
            "agreement on y proves little: PyTorch itself returns the same for every row",
        ),
        (
            np.arange(24.0).reshape(8, 3),
            "top-1 agreement on y proves little: in every row the largest element of PyTorch's is column 2",
        ),
        (np.eye(8), None),
        (np.arange(24).reshape(8, 3), None),
        (np.arange(24.0).reshape(8, 3, 1), None),
        (np.arange(8), None),
        (np.arange(12.0).reshape(4, 3), None),
        (np.zeros((0, 3)), "agreement on y proves little: PyTorch itself returns no element"),
    ],
)
def test_a_reference_that_proves_little_gets_a_note(array, why):
    assert list(says_little({"y": array})) == (
        [f"{why}; a batch with more varied outputs would prove more"] if why else []
    )
