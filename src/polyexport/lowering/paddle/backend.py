"""Paddle's `Backend`, and the table in which this folder's operators register."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from polyexport.lowering.backend import Backend, Tensor
from polyexport.lowering.operators import SHARED
from polyexport.lowering.operators.resize import Axis, Mode, native_kind
from polyexport.lowering.paddle.loops import cond, loop, steps
from polyexport.lowering.paddle.primitives import (
    add,
    as_tensor,
    cast,
    column,
    extreme,
    fourier,
    from_end,
    gather,
    line,
    log_sum_exp,
    matmul,
    normal,
    pad,
    reduction,
    relu,
    reshape,
    reverse_within,
    round_,
    scatter_add,
    sizes_of,
    softplus,
    split,
    squeeze,
    static_shape,
    take_along,
    transpose,
    uniform,
    unsqueeze,
    where,
)
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
    """By Paddle's own interpolation."""
    found = native_kind(x, plan, how)
    if found is None:
        return None
    size, kind = found
    if kind == "nearest":
        return Value(x.backend, F.interpolate(x.tensor, size, mode="nearest"))
    flags = {"align_corners": kind == "align_corners", "align_mode": int(kind == "asymmetric")}
    return Value(x.backend, F.interpolate(x.tensor, size, mode="bilinear", **flags))


def grid_sample(x: Value, grid: Value, mode: str, padding: str, align_corners: bool) -> Tensor | None:
    """By Paddle's own operator, which is bilinear and of one type."""
    if mode in ("linear", "bilinear") and x.rank in (4, 5) and x.dtype == grid.dtype:
        return F.grid_sample(x.tensor, grid.tensor, "bilinear", padding, align_corners)
    return None


def backend(weights: Weights) -> Backend:
    """Paddle, with its weights in `weights`; it keeps ONNX's order of axes, so that nothing is stored in another."""
    greatest = extreme(paddle.max, -1, weights)
    return Backend(
        name="Paddle",
        types=TYPES,
        index=np.dtype(np.int64),
        constant=weights.tensor,
        shape=lambda tensor: tuple(static_shape(tensor)),
        dtype=lambda tensor: numpy_dtype(tensor.dtype),
        evaluate=evaluate,
        set_shape=set_shape,
        scope=lambda: None,
        computed_in=computed_in,
        sizes=sizes_of,
        full=lambda sizes, content, dtype: paddle.full(list(sizes), content, paddle_dtype(dtype)),
        zeros_like=lambda x, dtype: paddle.zeros_like(x, paddle_dtype(dtype)),
        range=line,
        normal=normal,
        uniform=uniform,
        transpose=transpose,
        reshape=reshape,
        broadcast=lambda x, sizes: paddle.expand(x, list(sizes)),
        squeeze=squeeze,
        unsqueeze=unsqueeze,
        concat=lambda tensors, axis: paddle.concat(list(tensors), axis),
        stack=lambda tensors, axis: paddle.stack(list(tensors), axis),
        split=split,
        tile=lambda x, counts: paddle.tile(x, list(counts)),
        repeat=lambda x, count, axis: paddle.repeat_interleave(x, count, axis),
        flip=lambda x, axes: paddle.flip(x, list(axes)),
        pad=pad,
        gather=gather,
        gather_nd=paddle.gather_nd,
        take_along=take_along,
        from_end=from_end,
        scatter_add=scatter_add,
        nonzero=paddle.nonzero,
        one_hot=lambda indices, count, axis: (
            paddle.unsqueeze(indices, axis) == column(line(0, count), axis, len(indices.shape) + 1)
        ),
        reverse_within=reverse_within,
        cast=cast,
        where=where,
        equal=paddle.equal,
        add=add,
        add_n=lambda tensors: paddle.add_n(list(tensors)),
        maximum=lambda x, y: paddle.maximum(x, as_tensor(y, x)),
        minimum=lambda x, y: paddle.minimum(x, as_tensor(y, x)),
        clip=paddle.clip,
        abs=paddle.abs,
        ceil=paddle.ceil,
        elu=F.elu,
        exp=paddle.exp,
        expm1=paddle.expm1,
        floor=paddle.floor,
        leaky_relu=F.leaky_relu,
        log=paddle.log,
        relu=relu,
        relu6=F.relu6,
        round=round_,
        rsqrt=paddle.rsqrt,
        sigmoid=F.sigmoid,
        softplus=softplus,
        softsign=F.softsign,
        sqrt=paddle.sqrt,
        tanh=paddle.tanh,
        softmax=F.softmax,
        log_softmax=F.log_softmax,
        fourier=fourier,
        sum=reduction(paddle.sum),
        mean=reduction(paddle.mean),
        prod=reduction(paddle.prod),
        max=greatest,
        min=extreme(paddle.min, 1, weights),
        peak=lambda x, axes, keepdims: paddle.amax(x, list(axes), keepdims),
        log_sum_exp=lambda x, axes, keepdims: log_sum_exp(x, axes, keepdims, greatest(x, axes, True)),
        argmax=paddle.argmax,
        argmin=paddle.argmin,
        matmul=matmul,
        einsum=lambda equation, tensors: paddle.einsum(equation, *tensors),
        cond=cond,
        loop=loop,
        steps=steps,
        resize=resize,
        grid_sample=grid_sample,
    )
