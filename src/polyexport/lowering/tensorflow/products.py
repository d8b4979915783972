"""Rewrites products in a frozen graph of TensorFlow's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from polyexport.lowering.backend import Tensor
from polyexport.lowering.tensorflow.primitives import reshape, tensor_sizes


def flattened(graph: tf.Graph) -> tf.Graph:
    """A copy of a `tf.Graph` whose products of shape (…, k) · (k, n) are of shape (rows, k) · (k, n)."""
    content = graph.as_graph_def()
    nodes = [node for node in content.node if not _is_wide_product(graph, node)]
    for node in (node for node in content.node if _is_wide_product(graph, node)):
        nodes += _replaced(node, graph.get_operation_by_name(node.name).inputs, _flat_product)
    made, copied = tf.compat.v1.GraphDef(library=content.library, versions=content.versions, node=nodes), tf.Graph()
    with copied.as_default():
        tf.import_graph_def(made, name="")
    return copied


def _is_wide_product(graph: Any, node: Any) -> bool:
    if node.op != "BatchMatMulV2" or node.attr["adj_x"].b or node.attr["adj_y"].b:
        return False
    one, other = graph.get_operation_by_name(node.name).inputs
    return other.shape.rank == 2 and (one.shape.rank or 0) > 2


def _flat_product(one: Tensor, other: Tensor) -> Tensor:
    *sizes, width = tensor_sizes(one)
    rows = tf.reshape(one, tf.stack([-1, width]))
    return reshape(tf.matmul(rows, other), [*sizes, tensor_sizes(other)[1]])


def _replaced(node: Any, inputs: Sequence[Tensor], function: Callable[..., Tensor]) -> list[Any]:
    """Nodes that compute a function of TensorFlow's in place of a node with one output."""
    with tf.Graph().as_default() as part:
        given = [tf.compat.v1.placeholder(each.dtype, each.shape) for each in inputs]
        result = function(*given).op.name
    named = [name for name in node.input if not name.startswith("^")]  # else another node that has to run before
    names = {each.op.name: name for each, name in zip(given, named, strict=True)}
    made = [each for each in part.as_graph_def().node if each.name not in names]
    names |= {each.name: node.name if each.name == result else f"{node.name}/{each.name}" for each in made}
    for each in made:
        each.name = names[each.name]
        each.input[:] = [":".join([names[name], *output]) for name, *output in (x.split(":") for x in each.input)]
    return made
