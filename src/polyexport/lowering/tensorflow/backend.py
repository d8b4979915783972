"""TensorFlow's `Backend`, and the table in which this folder's operators register."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from polyexport.lowering.backend import ELEMENT_TYPES, Backend
from polyexport.lowering.operators import SHARED
from polyexport.lowering.operators.resize import Axis, Mode, native_kind
from polyexport.lowering.table import Operators
from polyexport.lowering.tensorflow import primitives
from polyexport.lowering.tensorflow.loops import loop, steps
from polyexport.lowering.tensorflow.weights import Weights, evaluate, set_shape
from polyexport.lowering.value import Value

OPS = Operators(SHARED)


def resize(x: Value, plan: list[Axis], how: Mode) -> Value | None:
    """By the image operators, channels last."""
    found = native_kind(x, plan, how)
    if found is None:
        return None
    images, (size, kind) = x.in_order(primitives.last(4)), found
    if kind == "nearest":
        return Value(x.backend, tf.raw_ops.ResizeNearestNeighbor(images=images, size=size), primitives.last(4))
    flags = {"half_pixel_centers": kind == "half_pixel", "align_corners": kind == "align_corners"}
    return Value(x.backend, tf.raw_ops.ResizeBilinear(images=images, size=size, **flags), primitives.last(4))


def backend(weights: Weights) -> Backend:
    """TensorFlow, with its weights in `weights`."""
    return Backend(
        name="TensorFlow",
        types={number: np.dtype(tf.as_dtype(name).as_numpy_dtype) for number, name in ELEMENT_TYPES.items()},
        index=np.dtype(np.int32),
        constant=weights.tensor,
        shape=lambda tensor: None if tensor.shape.rank is None else tuple(tensor.shape.as_list()),
        dtype=lambda tensor: np.dtype(tensor.dtype.as_numpy_dtype),
        evaluate=evaluate,
        set_shape=set_shape,
        scope=lambda: None if tf.executing_eagerly() else tf.compat.v1.get_default_graph(),
        computed_in=lambda value: None,
        sizes=primitives.sizes_of,
        full=primitives.full,
        zeros_like=lambda x, dtype: tf.zeros_like(x, tf.as_dtype(dtype)),
        range=lambda start, end: tf.range(start, end),
        normal=primitives.drawn(tf.random.normal),
        uniform=primitives.drawn(tf.random.uniform),
        transpose=lambda x, order: tf.transpose(x, list(order)),
        reshape=primitives.reshape,
        broadcast=primitives.broadcast,
        squeeze=lambda x, axes: tf.squeeze(x, list(axes)),
        unsqueeze=primitives.unsqueeze,
        concat=lambda tensors, axis: tf.concat(list(tensors), axis),
        stack=lambda tensors, axis: tf.stack(list(tensors), axis),
        split=primitives.split,
        tile=lambda x, counts: tf.tile(x, primitives.vector(counts)),
        flip=lambda x, axes: tf.reverse(x, list(axes)),
        pad=primitives.pad,
        gather=lambda x, indices, axis: tf.gather(x, indices, axis=axis),
        gather_nd=lambda x, indices: tf.gather_nd(x, indices),
        take_along=lambda x, indices, axis: tf.gather_nd(x, primitives.grid(indices, axis)),
        from_end=primitives.from_end,
        scatter_add=primitives.scatter_add,
        nonzero=primitives.nonzero,
        one_hot=lambda indices, count, axis: tf.one_hot(indices, count, True, False, axis),
        cast=lambda x, dtype: tf.cast(x, tf.as_dtype(dtype)),
        where=primitives.where,
        add=tf.add,
        add_n=lambda tensors: tf.add_n(list(tensors)),
        maximum=tf.maximum,
        minimum=tf.minimum,
        clip=tf.clip_by_value,
        abs=primitives.magnitude,
        ceil=tf.math.ceil,
        elu=primitives.elu,
        exp=tf.exp,
        expm1=tf.math.expm1,
        floor=tf.floor,
        leaky_relu=lambda x, alpha: tf.nn.leaky_relu(x, alpha),
        log=tf.math.log,
        relu=tf.nn.relu,
        relu6=tf.nn.relu6,
        round=tf.round,
        rsqrt=tf.math.rsqrt,
        sigmoid=tf.sigmoid,
        softplus=tf.math.softplus,
        softsign=tf.nn.softsign,
        sqrt=tf.sqrt,
        tanh=tf.tanh,
        softmax=tf.nn.softmax,
        log_softmax=tf.nn.log_softmax,
        fourier=primitives.fourier,
        sum=primitives.reduction(tf.reduce_sum),
        mean=primitives.reduction(tf.reduce_mean),
        prod=primitives.reduction(tf.reduce_prod),
        max=primitives.wide(tf.reduce_max),
        min=primitives.wide(tf.reduce_min),
        peak=primitives.wide(tf.reduce_max),
        log_sum_exp=primitives.reduction(tf.reduce_logsumexp),
        argmax=primitives.extreme(tf.argmax, tf.reduce_max),
        argmin=primitives.extreme(tf.argmin, tf.reduce_min),
        matmul=primitives.matmul,
        einsum=lambda equation, tensors: tf.einsum(equation, *tensors),
        cond=tf.cond,
        loop=loop,
        steps=steps,
        resize=resize,
        grid_sample=lambda *_: None,
        layer_norm=lambda *_: None,
        recurrent=lambda *_: None,
    )
