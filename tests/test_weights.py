"""What is said of weights that stayed in float: one rule for all formats."""

from __future__ import annotations

import pytest

from polyexport.measure.weights import InFloat, in_float, is_weight


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (0, InFloat("3 × Softmax")),
        (10, InFloat("3 × Softmax")),
        (11, InFloat("3 × Softmax; 11% of its weights in float, since so")),
        (50, InFloat("3 × Softmax; 50% of its weights in float, since so")),
        (51, InFloat("3 × Softmax", "51% of its weights in float, since so")),
        (100, InFloat("3 × Softmax", "100% of its weights in float, since so")),
    ],
)
def test_a_share_of_weights_in_float_is_a_remark_and_most_of_them_a_shortfall(weights, expected):
    assert in_float(weights, 100, "since so", "3 × Softmax") == expected


def test_a_model_without_weights_has_no_shortfall():
    assert in_float(0, 0) == InFloat()


def test_biases_and_scales_do_not_count_as_weights_in_any_shape():
    assert [is_weight(shape) for shape in ([16], [1, 16, 1, 1], [16, 1], [16, 3], [4, 1, 3, 3])] == [
        False,
        False,
        False,
        True,
        True,
    ]
