"""Paddle's `Backend`, and the table in which this folder's operators register."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.operators import SHARED
from polyexport.lowering.operators.resize import Axis, Mode, native_kind
from polyexport.lowering.paddle import primitives
from polyexport.lowering.paddle.loops import cond, loop, steps
from polyexport.lowering.paddle.recurrent import recurrent
from polyexport.lowering.paddle.weights import (
    TYPES,
    Weights,
    computed_in,
    evaluate,
    numpy_dtype,
    paddle_dtype,
    set_shape,
)
from polyexport.lowering.table import Operators
from polyexport.lowering.value import Value

OPS = Operators(SHARED)


def resize(x: Value, plan: list[Axis], how: Mode) -> Value | None:
    """By Paddle's own interpolation; on CPUs, Paddle Inference computes each linear one as "half_pixel" by oneDNN."""
    found = native_kind(x, plan, how)
    if found is None or found[1] not in ("nearest", "half_pixel"):
        return None
    size, kind = found
    if kind == "nearest":
        return Value(x.backend, F.interpolate(x.tensor, size, mode="nearest"))
    return Value(x.backend, F.interpolate(x.tensor, size, mode="bilinear", align_corners=False, align_mode=0))


def grid_sample(x: Value, grid: Value, mode: str, padding: str, align_corners: bool) -> Tensor | None:
    """By Paddle's own operator, which is bilinear and of one type."""
    if mode in ("linear", "bilinear") and x.rank in (4, 5) and x.dtype == grid.dtype:
        return F.grid_sample(x.tensor, grid.tensor, "bilinear", padding, align_corners)
    return None


def backend(weights: Weights) -> Backend:
    """Paddle, with its weights in `weights`; it keeps ONNX's order of axes, so that nothing is stored in another."""
    greatest = primitives.extreme(paddle.max, -1, weights)
    return Backend(
        name="Paddle",
        types=TYPES,
        index=np.dtype(np.int64),
        constant=weights.tensor,
        shape=lambda tensor: tuple(primitives.static_shape(tensor)),
        dtype=lambda tensor: numpy_dtype(tensor.dtype),
        evaluate=evaluate,
        set_shape=set_shape,
        scope=lambda: None,
        computed_in=computed_in,
        sizes=primitives.sizes_of,
        full=primitives.full(weights),
        zeros_like=lambda x, dtype: paddle.zeros_like(x, paddle_dtype(dtype)),
        range=primitives.line,
        normal=primitives.normal,
        uniform=primitives.uniform,
        transpose=primitives.transpose,
        reshape=primitives.reshape,
        broadcast=primitives.broadcast,
        squeeze=primitives.squeeze,
        unsqueeze=primitives.unsqueeze,
        concat=lambda tensors, axis: paddle.concat(list(tensors), axis),
        stack=lambda tensors, axis: paddle.stack(list(tensors), axis),
        split=primitives.split,
        tile=lambda x, counts: paddle.tile(x, list(counts)),
        flip=lambda x, axes: paddle.flip(x, list(axes)),
        pad=primitives.pad,
        gather=primitives.gather,
        gather_nd=paddle.gather_nd,
        take_along=primitives.take_along,
        from_end=primitives.from_end,
        scatter_add=primitives.scatter_add,
        nonzero=paddle.nonzero,
        one_hot=primitives.one_hot,
        cast=primitives.cast,
        where=primitives.where,
        add=primitives.add,
        add_n=lambda tensors: paddle.add_n(list(tensors)),
        maximum=lambda x, y: paddle.maximum(x, primitives.as_tensor(y, x)),
        minimum=lambda x, y: paddle.minimum(x, primitives.as_tensor(y, x)),
        clip=paddle.clip,
        abs=paddle.abs,
        ceil=paddle.ceil,
        elu=F.elu,
        exp=paddle.exp,
        expm1=paddle.expm1,
        floor=paddle.floor,
        leaky_relu=F.leaky_relu,
        log=paddle.log,
        relu=primitives.relu,
        relu6=F.relu6,
        round=primitives.round_,
        rsqrt=paddle.rsqrt,
        sigmoid=F.sigmoid,
        softplus=primitives.softplus,
        softsign=F.softsign,
        sqrt=paddle.sqrt,
        tanh=paddle.tanh,
        softmax=F.softmax,
        log_softmax=F.log_softmax,
        fourier=primitives.fourier,
        sum=primitives.reduction(paddle.sum),
        mean=primitives.reduction(paddle.mean),
        prod=primitives.reduction(paddle.prod),
        max=greatest,
        min=primitives.extreme(paddle.min, 1, weights),
        peak=lambda x, axes, keepdims: paddle.amax(x, list(axes), keepdims),
        log_sum_exp=lambda x, axes, keepdims: primitives.log_sum_exp(x, axes, keepdims, greatest(x, axes, True)),
        argmax=paddle.argmax,
        argmin=paddle.argmin,
        matmul=primitives.matmul,
        einsum=lambda equation, tensors: paddle.einsum(equation, *tensors),
        cond=cond,
        loop=loop,
        steps=steps,
        resize=resize,
        grid_sample=grid_sample,
        layer_norm=primitives.layer_norm,
        recurrent=recurrent,
    )
