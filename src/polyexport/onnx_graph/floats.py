"""Converts an ONNX graph to float32 only, for runtimes without other types and without gathers.

Requirements:
* Shapes are static, and constants are folded already.
* Booleans are 0 or 1, integers are floats with integer values; sizes, axes and so on stay as operators need them.
* An input that only indexes rows of a table (ids of an embedding) stays an integer.
* Gathers with constant indices become slices; a maximum along axes becomes a pool.
* Infinity in a Where becomes the largest finite number, since 0 times infinity is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.onnx_graph.decompose import decomposed
from polyexport.onnx_graph.static_shapes import set_values

if TYPE_CHECKING:
    import onnx

_FUNCTIONS = (
    "Not (x) => (y) { one = Constant<value_float = 1.0>() y = Sub(one, x) }",
    "And (a, b) => (y) { y = Mul(a, b) }",
    "Or (a, b) => (y) { y = Max(a, b) }",
    "Xor (a, b) => (y) { less = Sub(a, b) y = Abs(less) }",
    "Equal (a, b) => (y) { less = Sub(a, b) size = Abs(less) differs = Sign(size) "
    "one = Constant<value_float = 1.0>() y = Sub(one, differs) }",
    "Greater (a, b) => (y) { less = Sub(a, b) sign = Sign(less) y = Relu(sign) }",
    "Less (a, b) => (y) { less = Sub(b, a) sign = Sign(less) y = Relu(sign) }",
    "GreaterOrEqual (a, b) => (y) { less = Sub(b, a) sign = Sign(less) below = Relu(sign) "
    "one = Constant<value_float = 1.0>() y = Sub(one, below) }",
    "LessOrEqual (a, b) => (y) { less = Sub(a, b) sign = Sign(less) above = Relu(sign) "
    "one = Constant<value_float = 1.0>() y = Sub(one, above) }",
    "Where (c, a, b) => (y) { one = Constant<value_float = 1.0>() rest = Sub(one, c) "
    "chosen = Mul(c, a) other = Mul(rest, b) y = Add(chosen, other) }",
    # by its definition, the exponential overflows float32
    "Softplus (x) => (y) { one = Constant<value_float = 1.0>() size = Abs(x) below = Neg(size) power = Exp(below) "
    "sum = Add(power, one) log = Log(sum) above = Relu(x) y = Add(above, log) }",
)

_STRUCTURAL: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "CumSum", "Expand", "Reshape", "Split", "Squeeze"), (1,)),
    **dict.fromkeys(("Tile", "TopK", "Unsqueeze", "Upsample"), (1,)),
    **{"ConstantOfShape": (0,), "Pad": (1, 3), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4)},
}
"""The inputs of operators that are sizes, axes or indices."""

_ORDERLY = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move elements."""

_MOST_SLICES = 64


def in_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with float32 as its only type; inputs that are only ids of embeddings stay integers.

    Raises:
        RuntimeError: a part of it cannot be converted.
    """
    return decomposed(_Rewrite(model).model(), _FUNCTIONS)


class _Rewrite:
    """A graph that is rewritten node by node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx
        from onnx import numpy_helper

        self._source = onnx.shape_inference.infer_shapes(model)
        graph = self._source.graph
        self._weights = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
        infos = {info.name: info.type.tensor_type for info in (*graph.input, *graph.value_info, *graph.output)}
        self._shapes = {name: tuple(dim.dim_value for dim in info.shape.dim) for name, info in infos.items()}
        self._shapes |= {name: array.shape for name, array in self._weights.items()}
        self._types = {name: info.elem_type for name, info in infos.items()}
        self._types |= {weight.name: weight.data_type for weight in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in graph.node:
            for index, name in enumerate(node.input):
                self._users.setdefault(name, []).append((node, index))
        outputs = {output.name for output in graph.output}
        self._ids = {value.name for value in graph.input if value.name not in outputs and self._is_id(value.name)}
        self._nodes: list[onnx.NodeProto] = []
        self._made: dict[str, np.ndarray] = {}

    def model(self) -> onnx.ModelProto:
        """The new graph."""
        import onnx
        from onnx import TensorProto, numpy_helper

        for node in self._source.graph.node:
            rule = _RULES.get(node.op_type)
            made = rule(self, node, _attributes(node)) if rule else None
            if made is None:
                self._copy(node)
            else:
                self._nodes.append(onnx.helper.make_node("Identity", [made], [node.output[0]]))
        found = onnx.ModelProto()
        found.CopyFrom(self._source)
        graph = found.graph
        for part in (graph.node, graph.initializer, graph.value_info):
            del part[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        arrays = {name: array for name, array in (self._weights | self._made).items() if name in used}
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        for value in (*graph.input, *graph.output):
            if value.name not in self._ids:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        set_values(graph.input, [value for value in graph.input if value.name in used])
        return found

    def _copy(self, node: onnx.NodeProto) -> None:
        """The same node, with its constants in float32 except sizes and so on."""
        structural = _STRUCTURAL.get(node.op_type, ())
        names = [name if index in structural else self.number(name) for index, name in enumerate(node.input)]
        copied = type(node)()
        copied.CopyFrom(node)
        copied.input[:] = names
        self._nodes.append(copied)

    def _is_id(self, name: str) -> bool:
        """Whether an integer tensor is only used to index rows of constant tables."""
        users = self._users.get(name, [])
        return bool(users) and all(
            (node.op_type == "Gather" and index == 1 and node.input[0] in self._weights and not _axis(node))
            or (node.op_type in _ORDERLY and index == 0 and self._is_id(node.output[0]))
            for node, index in users
        )

    def stays_integer(self, name: str) -> bool:
        """Whether a tensor is an input that is only used as ids of embeddings, possibly reshaped."""
        while name in self._makers and self._makers[name].op_type in _ORDERLY:
            name = self._makers[name].input[0]
        return name in self._ids

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the old graph."""
        return self._shapes[name]

    def type(self, name: str) -> int:
        """The type of a tensor of the old graph, as ONNX's number."""
        found: int = self._types.get(name, 0)
        return found

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The old graph's node that computes a tensor."""
        return self._makers.get(name)

    def weight(self, name: str) -> np.ndarray | None:
        """A constant of the old graph."""
        return self._weights.get(name)

    def number(self, name: str) -> str:
        """The name of a tensor; a constant is added in float32."""
        array = self._weights.get(name)
        if array is None or array.dtype == np.float32:
            return name
        return self.constant(array.astype(np.float32), f"{name}_in_float32")

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """A new constant."""
        name = name or f"polyexport_constant_{len(self._made)}"
        self._made[name] = array
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output's name of a new node."""
        import onnx

        name = f"polyexport_float_{len(self._nodes)}"
        self._nodes.append(onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """A reshaped tensor."""
        return self.add("Reshape", x, self.constant(np.asarray(shape, np.int64)))

    def pick(self, x: str, indices: np.ndarray, axis: int, size: int) -> str:
        """The elements of an axis of `size` at constant one-dimensional `indices`, as slices.

        Raises:
            RuntimeError: there would be more than `_MOST_SLICES`.
        """
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        if len(runs) > _MOST_SLICES:
            raise RuntimeError(f"a gather of {len(runs)} separate pieces from an axis of size {size} is not supported")
        if len(runs) == 1 and len(indices) == size:
            return x
        parts = [self._slice(x, int(run[0]), int(run[-1]) + 1, axis) for run in runs]
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=axis)

    def _slice(self, x: str, start: int, end: int, axis: int) -> str:
        return self.add("Slice", x, *(self.constant(np.array([number], np.int64)) for number in (start, end, axis)))

    def greatest(self, x: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
        """The maximum along axes, which are kept with size 1, as a pool."""
        rest = [axis for axis in range(len(shape)) if axis not in axes]
        order = [*rest, *axes]
        if order != sorted(order):
            x = self.add("Transpose", x, perm=order)
        count = math.prod(shape[axis] for axis in axes)
        flat = self.reshape(x, 1, math.prod(shape) // count, count)
        pooled = self.add("GlobalMaxPool", flat)
        return self.reshape(pooled, *(1 if axis in axes else size for axis, size in enumerate(shape)))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _axis(node: onnx.NodeProto) -> int:
    found: int = _attributes(node).get("axis", 0)
    return found


Rule = Callable[[_Rewrite, "onnx.NodeProto", dict[str, Any]], str | None]
"""Rewrites a node and returns its output's name; None if the node is unchanged."""


def _cast(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    x, to = graph.number(node.input[0]), attributes["to"]
    if to in floats or graph.type(node.input[0]) in (to, TensorProto.BOOL) or graph.stays_integer(node.input[0]):
        return x
    size = graph.add("Abs", x)
    if to == TensorProto.BOOL:
        return graph.add("Sign", size)
    if graph.type(node.input[0]) in floats:
        return graph.add("Mul", graph.add("Sign", x), graph.add("Floor", size))
    return x


def _where(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    """Remove a softmax's guard against rows of only infinities, which do not occur anymore."""
    condition, chosen, other = node.input
    maker = graph.maker(condition)
    if maker is not None and maker.op_type == "IsNaN" and maker.input[0] == other:
        return str(other)
    most = np.finfo(np.float32).max
    finite = [
        name if (array := graph.weight(name)) is None else graph.constant(np.clip(array, -most, most, dtype=np.float32))
        for name in (chosen, other)
    ]
    return graph.add("Where", graph.number(condition), *finite)


def _divide(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    """Integer division truncates toward zero."""
    from onnx import TensorProto

    if graph.type(node.output[0]) not in (TensorProto.INT32, TensorProto.INT64):
        return None
    share = graph.add("Div", *map(graph.number, node.input))
    return graph.add("Mul", graph.add("Sign", share), graph.add("Floor", graph.add("Abs", share)))


def _gather(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    data, index = node.input
    axis = attributes.get("axis", 0) % len(graph.shape(data))
    size, indices = graph.shape(data)[axis], graph.weight(index)
    if indices is not None and indices.ndim:
        picked = graph.pick(graph.number(data), indices.ravel() % size, axis, size)
        return graph.reshape(picked, *graph.shape(node.output[0]))
    if graph.weight(data) is None or axis or indices is not None:
        return None
    if graph.stays_integer(index):
        # with an axis attribute, even 0, pnnx does not recognize an embedding
        return graph.add("Gather", graph.number(data), index)
    one = graph.constant(np.ones((), np.float32))
    column = graph.reshape(index, *graph.shape(index), 1)
    apart = graph.add("Abs", graph.add("Sub", column, graph.constant(np.arange(size, dtype=np.float32))))
    return graph.add("MatMul", graph.add("Relu", graph.add("Sub", one, apart)), graph.number(data))


def _gather_elements(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    indices, axis = graph.weight(node.input[1]), attributes.get("axis", 0)
    if indices is None:
        return None
    return _picked(graph, node, lambda numbered: np.take_along_axis(numbered, indices % numbered.shape[axis], axis))


def _gather_nd(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    indices = graph.weight(node.input[1])
    if indices is None or attributes.get("batch_dims", 0):
        return None
    return _picked(graph, node, lambda numbered: numbered[tuple(np.moveaxis(indices, -1, 0))])


def _picked(graph: _Rewrite, node: onnx.NodeProto, pick: Callable[[np.ndarray], np.ndarray]) -> str:
    """The result of indexing a tensor by constants; `pick` applies it to a tensor of element numbers."""
    data = node.input[0]
    count = math.prod(graph.shape(data))
    indices = pick(np.arange(count).reshape(graph.shape(data)))
    flat = graph.pick(graph.reshape(graph.number(data), 1, count), indices.ravel(), 1, count)
    return graph.reshape(flat, *graph.shape(node.output[0]))


def _reduce(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    """By the four reductions that pnnx supports, over the row's axis too: it ignores a reduction of a single axis."""
    before, kind, after = _REDUCTIONS[node.op_type.removeprefix("Reduce")]
    shape, axes = _axes(graph, node, attributes)
    x = graph.number(node.input[0])
    if shape[:1] != (1,):
        x, axes = graph.reshape(x, 1, *shape), tuple(axis + 1 for axis in axes)
    x = graph.add("Mul", x, x) if before == "Mul" else graph.add(before, x) if before else x
    every = graph.constant(np.array(sorted({0, *axes}), np.int64))
    found = graph.add(f"Reduce{kind}", x, every, keepdims=1)
    return graph.reshape(graph.add(after, found) if after else found, *graph.shape(node.output[0]))


def _axes(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input shape of a reduction, and its axes: all if it names none."""
    shape = graph.shape(node.input[0])
    given = graph.weight(node.input[1]) if len(node.input) > 1 else attributes.get("axes")
    if given is None or not len(given):
        given = () if attributes.get("noop_with_empty_axes") else range(len(shape))
    return shape, tuple(int(axis) % len(shape) for axis in given)


_REDUCTIONS: Mapping[str, tuple[str, str, str]] = {
    "L1": ("Abs", "Sum", ""),
    "L2": ("Mul", "Sum", "Sqrt"),
    "LogSum": ("", "Sum", "Log"),
    "LogSumExp": ("", "LogSumExp", ""),
    "Mean": ("", "Mean", ""),
    "Prod": ("", "Prod", ""),
    "Sum": ("", "Sum", ""),
    "SumSquare": ("Mul", "Sum", ""),
}
"""The operators before and after one of the reductions that pnnx supports; `Mul` is a square."""


def _reduce_max(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    return _extreme(graph, node, attributes, lambda x: x)


def _reduce_min(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    return _extreme(graph, node, attributes, lambda x: graph.add("Neg", x))


def _extreme(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any], signed: Callable[[str], str]) -> str:
    shape, axes = _axes(graph, node, attributes)
    found = signed(graph.greatest(signed(graph.number(node.input[0])), shape, axes))
    return graph.reshape(found, *graph.shape(node.output[0]))


def _arg_max(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    return _arg(graph, node, attributes, graph.number(node.input[0]))


def _arg_min(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any]) -> str | None:
    return _arg(graph, node, attributes, graph.add("Neg", graph.number(node.input[0])))


def _arg(graph: _Rewrite, node: onnx.NodeProto, attributes: dict[str, Any], x: str) -> str:
    """The first or last index at which `x` is its maximum; all other indices are moved past the end."""
    shape = graph.shape(node.input[0])
    axis = attributes.get("axis", 0) % len(shape)
    size, last = shape[axis], attributes.get("select_last_index", 0)
    differs = graph.add("Sign", graph.add("Sub", graph.greatest(x, shape, (axis,)), x))
    away = graph.add("Mul", differs, graph.constant(np.array(-size, np.float32)))
    indices = np.arange(size, dtype=np.float32).reshape(-1, *(1 for _ in shape[axis + 1 :]))
    found = graph.greatest(graph.add("Add", away, graph.constant(indices if last else -indices)), shape, (axis,))
    return graph.reshape(found if last else graph.add("Neg", found), *graph.shape(node.output[0]))


_RULES: Mapping[str, Rule] = {
    "ArgMax": _arg_max,
    "ArgMin": _arg_min,
    "Cast": _cast,
    "Div": _divide,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS},
    "ReduceMax": _reduce_max,
    "ReduceMin": _reduce_min,
    "Where": _where,
}
