"""Walks an ONNX graph node by node to lower it to a framework.

Requirements:
* An operator is found by its name and opset version. One without a lowering is replaced by its function body in the
  ONNX standard, or computed at once if its inputs are constants; else an error names it, and nothing is written.
* What depends only on constants is computed at once, so that shapes are static where possible.
* Functions of the model are inlined; the graphs of If, Loop and Scan see the values around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.errors import line
from polyexport.lowering.backend import Backend
from polyexport.lowering.definitions import definition, evaluated, with_attributes
from polyexport.lowering.opsets import current
from polyexport.lowering.protobuf import attribute_value, dense, domain_name
from polyexport.lowering.sizes import infer
from polyexport.lowering.table import Operator, Operators, UnsupportedOp, integers
from polyexport.lowering.value import Value

if TYPE_CHECKING:
    import onnx

Flow = Any
"""What an edge carries: a `Value`, a list of them (an ONNX sequence), or None (an empty optional)."""

Scope = dict[str, Flow]

_FOLD_LIMIT = 1 << 24  # elements; folded constants are written into the artifact
_DRAWING = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_NEVER_FOLDED = _DRAWING | {"If", "Loop", "Scan", "SequenceMap"}


@dataclass(frozen=True)
class Node:
    """A node, as it is passed to an operator's function."""

    proto: onnx.NodeProto
    version: int
    lowering: Lowering
    scope: Scope

    @property
    def ops(self) -> Backend:
        """The primitives of the framework."""
        return self.lowering.ops

    @property
    def outputs(self) -> int:
        """Number of outputs of the node."""
        return len(self.proto.output)

    def wants(self, index: int) -> bool:
        """Whether the node's output `index` is used."""
        return index < self.outputs and bool(self.proto.output[index])

    def lower(self, op: str, *inputs: Flow, **attributes: Any) -> Any:
        """The result of another operator of the same opset."""
        operator = self.lowering.table.find("", op, self.version)
        if operator is None:
            raise self.unsupported(f"it is composed of {op}, and there is no lowering for that")
        return _bind(operator, self, inputs, attributes)

    def run(self, graph: onnx.GraphProto, inputs: Sequence[Flow]) -> list[Flow]:
        """Lower one of the node's subgraphs with values for its formal inputs; returns its outputs."""
        names = [value.name for value in graph.input]
        return self.lowering.run(graph, dict(zip(names, inputs, strict=False)), self.scope)

    def value(self, content: Any, order: tuple[int, ...] | None = None) -> Value:
        """A tensor, stored in `order`, or a numpy array, as a `Value`."""
        return self.lowering.value(content, order)

    def unsupported(self, why: str) -> UnsupportedOp:
        """The error that names the node."""
        return UnsupportedOp(f"{self}: {why}")

    def __str__(self) -> str:
        domain = f"{self.proto.domain}." if self.proto.domain else ""
        name = self.proto.name or ", ".join(self.proto.output)
        return f"ONNX operator {domain}{self.proto.op_type} (node {name!r}, opset {self.version})"


class Lowering:
    """The lowering of one model to one framework."""

    def __init__(self, ops: Backend, table: Operators, model: onnx.ModelProto) -> None:
        self.ops = ops
        self.table = table
        self.model = model
        self.opsets = {domain_name(opset.domain): opset.version for opset in model.opset_import}
        self._weights: dict[tuple[str, int], Value] = {}

    def value(self, content: Any, order: tuple[int, ...] | None = None) -> Value:
        """A tensor, stored in `order`, or a numpy array, as a `Value`."""
        if isinstance(content, np.ndarray | np.generic):
            return Value(self.ops, known=np.asarray(content))
        return Value(self.ops, content, order)

    def outputs(self, inputs: Mapping[str, Any]) -> list[Flow]:
        """The model's outputs for tensors as inputs."""
        return self.run(self.model.graph, {name: self.value(tensor) for name, tensor in inputs.items()}, {})

    def run(self, graph: onnx.GraphProto, inputs: Scope, outer: Scope) -> list[Flow]:
        """Lower a graph inside a scope; returns its outputs."""
        scope: Scope = {**outer, **{weight.name: self._weight(weight) for weight in graph.initializer}}
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = self.value(dense(sparse))
        scope |= inputs
        claims = {info.name: info for info in graph.value_info}
        for proto in graph.node:
            self._node(proto, scope, claims)
        return [scope[output.name] for output in graph.output]

    def _weight(self, weight: onnx.TensorProto) -> Value:
        """A constant's value, the same one whenever a subgraph is lowered again, so that its tensor is shared."""
        from onnx import numpy_helper

        key = (weight.name, id(weight))
        if key not in self._weights:
            self._weights[key] = self.value(numpy_helper.to_array(weight))
        return self._weights[key]

    def _node(self, proto: onnx.NodeProto, scope: Scope, claims: Mapping[str, onnx.ValueInfoProto]) -> None:
        domain = domain_name(proto.domain)
        node = Node(proto, self.opsets.get(domain, 1), self, scope)
        inputs = [scope[name] if name else None for name in proto.input]
        operator = self.table.find(domain, proto.op_type, node.version)
        try:
            outputs = self._expanded(node, inputs) if operator is None else self._lowered(node, operator, inputs)
        except UnsupportedOp:
            raise
        except Exception as error:  # whatever the framework raises, the message must name the node
            shapes = ", ".join(str(value.shape) if isinstance(value, Value) else "-" for value in inputs)
            raise node.unsupported(f"with inputs of shapes {shapes}: {line(error, 300)}") from error
        for name, output in zip(proto.output, outputs, strict=False):
            if name:
                scope[name] = self._refined(output, claims.get(name))
                if isinstance(output, Value) and scope[name].rank is None:
                    raise node.unsupported("the rank of its result is not known before the run")

    def _lowered(self, node: Node, operator: Operator, inputs: list[Flow]) -> list[Flow]:
        attributes: Mapping[str, Any] = {each.name: attribute_value(each) for each in node.proto.attribute}
        if not domain_name(node.proto.domain):
            inputs, attributes = current(node.proto.op_type, node.version, inputs, attributes)

        def values() -> list[Flow]:
            return self._values(call(operator, node, inputs, attributes))

        given = [value for value in inputs if value is not None]
        if given and node.proto.op_type not in _NEVER_FOLDED and all(_is_known(value) for value in given):
            folded = self._folded(values, given)
            if folded is not None:
                return folded
        found = values()
        if attributes.get("to", 7) in (6, 7) and isinstance(found[0], Value) and found[0].known is None:
            sizes = infer(node.proto.op_type, inputs, attributes)
            if sizes is not None:
                found[0] = self._with_sizes(found[0], sizes)
        return found

    def _folded(self, values: Callable[[], list[Flow]], given: Sequence[Flow]) -> list[Flow] | None:
        """The outputs for constant inputs, computed now; None if they are too large."""

        def outputs() -> list[Any]:
            return [value.tensor if isinstance(value, Value) and value.known is None else value for value in values()]

        found = self.ops.evaluate(outputs)
        taken = sum(value.known.size for value in given if isinstance(value, Value) and value.known is not None)
        made = sum(array.size for array in found if isinstance(array, np.ndarray))
        return None if made > max(_FOLD_LIMIT, taken) else self._values(tuple(found))

    def _values(self, result: Any) -> list[Flow]:
        results = result if isinstance(result, tuple) else (result,)
        kept = (Value, list, type(None))
        return [each if isinstance(each, kept) else self.value(each) for each in results]

    def _with_sizes(self, value: Value, sizes: np.ndarray) -> Value:
        if value.dtype.kind not in "iu":
            return value
        if all(entry is not None for entry in sizes.ravel()):
            return self.value(sizes.astype(value.dtype))
        return Value(self.ops, value.tensor, sizes=sizes)

    def _refined(self, value: Flow, claim: onnx.ValueInfoProto | None) -> Flow:
        """Outputs with sizes that the exporter recorded and the framework could not infer."""
        if claim is None or not isinstance(value, Value) or value.known is not None or value.order:
            return value
        shape = value.shape
        dimensions = claim.type.tensor_type.shape.dim
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in dimensions]
        if shape is None and claim.type.tensor_type.HasField("shape"):
            return self.value(self.ops.set_shape(value.tensor, sizes))
        if shape is None or len(shape) != len(dimensions) or None not in shape:
            return value
        merged = [claimed if have is None else have for have, claimed in zip(shape, sizes, strict=True)]
        if merged == list(shape):
            return value
        return Value(self.ops, self.ops.set_shape(value.tensor, merged), sizes=value.sizes)

    def _expanded(self, node: Node, inputs: list[Flow]) -> list[Flow]:
        """Lower an operator by its function body in the ONNX standard.

        `onnx.inliner` is not used: in the Paddle toolchain's ONNX (1.17) it inlines only a model's own functions, and
        none knows the types that a definition may depend on before the walk.
        """
        body, defaults = definition(node.proto, node.version, inputs)
        if body is None:
            if not inputs or not all(value is None or _is_known(value) for value in inputs):
                raise node.unsupported("there is no lowering for it")
            return self._values(evaluated(node.proto, node.version, inputs))
        given: Scope = dict(zip(body.input, inputs, strict=False))
        given |= dict.fromkeys(body.input[len(inputs) :])
        opsets = self.opsets
        self.opsets = {**opsets, **{domain_name(opset.domain): opset.version for opset in body.opset_import}}
        try:
            for proto in body.node:
                self._node(with_attributes(proto, node.proto, defaults), given, {})
        finally:
            self.opsets = opsets
        return [given.get(name) for name in body.output]


def call(operator: Operator, node: Node, inputs: Sequence[Flow], attributes: Mapping[str, Any]) -> Any:
    """Call an operator's function on a node.

    Inputs of types with few kernels in the framework are cast to a wider type, and outputs that ONNX defines to have
    such an input's type are cast back.

    Raises:
        UnsupportedOp: the node has inputs or attributes that the function does not support.
    """
    wider = [None if operator.narrow or not isinstance(x, Value) else node.ops.computed_in(x) for x in inputs]
    if all(dtype is None for dtype in wider):
        return _bind(operator, node, inputs, attributes)
    wide = [x if dtype is None else x.cast(dtype) for x, dtype in zip(inputs, wider, strict=True)]
    result = _bind(operator, node, wide, attributes)
    types = _types(node, [None if dtype is None else x.dtype for x, dtype in zip(inputs, wider, strict=True)])
    results = result if isinstance(result, tuple) else (result,)
    return tuple(_narrowed(output, types.get(position), node) for position, output in enumerate(results))


def _bind(operator: Operator, node: Node, inputs: Sequence[Flow], attributes: Mapping[str, Any]) -> Any:
    leading = (node.ops,) if operator.takes("ops") else ()
    itself = {"node": node} if operator.takes("node") else {}
    try:
        bound = operator.signature.bind(*leading, *inputs, **attributes, **itself)
    except TypeError as error:
        raise UnsupportedOp(f"{node}: {error}") from None
    for name, single in operator.known.items():
        value = bound.arguments.get(name)
        if isinstance(value, Value):
            bound.arguments[name] = integers(value, single)
            if bound.arguments[name] is None:
                raise node.unsupported(f"its input {name!r} is not known before the run")
    return operator.function(*bound.args, **bound.kwargs)


def _types(node: Node, cast: Sequence[np.dtype[Any] | None]) -> Mapping[int, np.dtype[Any]]:
    """The original type of each output that ONNX defines to have the type of an input that was cast."""
    import onnx

    schema: Any = onnx.defs.get_schema(node.proto.op_type, node.version, domain_name(node.proto.domain))
    given = {
        schema.inputs[min(position, len(schema.inputs) - 1)].type_str: dtype
        for position, dtype in enumerate(cast)
        if dtype is not None
    }
    names = [schema.outputs[min(position, len(schema.outputs) - 1)].type_str for position in range(node.outputs)]
    return {position: given[name] for position, name in enumerate(names) if name in given}


def _narrowed(result: Any, dtype: np.dtype[Any] | None, node: Node) -> Any:
    if dtype is None or result is None or isinstance(result, list):
        return result
    return (result if isinstance(result, Value) else node.value(result)).cast(dtype)


def _is_known(value: Flow) -> bool:
    if isinstance(value, list):
        return all(_is_known(each) for each in value)
    return isinstance(value, Value) and value.known is not None
