"""Operators as the ONNX standard defines them: by others, or by a reference implementation, for constant inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.lowering.protobuf import domain_name
from polyexport.lowering.value import Value

if TYPE_CHECKING:
    import onnx


def definition(
    node: onnx.NodeProto, version: int, inputs: Sequence[Any]
) -> tuple[onnx.FunctionProto | None, Mapping[str, onnx.AttributeProto]]:
    """The function body of a node's operator in the standard, or None, and its attributes' defaults.

    Args:
        node: The node.
        version: The opset version that it is of.
        inputs: Its inputs, on whose types a body may depend.
    """
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(node.op_type, version, domain_name(node.domain))
    except onnx.defs.SchemaError:
        return None, {}
    body = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        types = [_type(value).SerializeToString() for value in inputs]
        versions = [each for each in schema.context_dependent_function_opset_versions if each <= version]
        if not versions:
            versions = schema.context_dependent_function_opset_versions
        text = schema.get_context_dependent_function_with_opset_version(versions[-1], node.SerializeToString(), types)
        body.ParseFromString(text)
    elif schema.has_function:
        body.CopyFrom(schema.function_body)
    defaults = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    return (body if body.node else None), {name: each for name, each in defaults.items() if each.name}


def evaluated(node: onnx.NodeProto, version: int, inputs: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """The outputs of a node for constant inputs, computed by the implementation that comes with the standard."""
    from onnx.reference import ReferenceEvaluator

    given = {name: value.known for name, value in zip(node.input, inputs, strict=True) if name}
    return tuple(ReferenceEvaluator(node, opsets={node.domain: version}).run(None, given))


def _type(value: Any) -> onnx.TypeProto:
    import onnx
    from onnx import helper

    if not isinstance(value, Value):
        return onnx.TypeProto()  # a sequence or a missing optional input has no known type
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def with_attributes(
    proto: onnx.NodeProto, caller: onnx.NodeProto, defaults: Mapping[str, onnx.AttributeProto]
) -> onnx.NodeProto:
    """A node of a function body with the attributes that refer to its caller's."""
    import onnx

    if not any(attribute.ref_attr_name for attribute in proto.attribute):
        return proto
    given = {**defaults, **{attribute.name: attribute for attribute in caller.attribute}}
    bound = onnx.NodeProto()
    bound.CopyFrom(proto)
    del bound.attribute[:]
    for attribute in proto.attribute:
        if not attribute.ref_attr_name:
            bound.attribute.append(attribute)
        elif attribute.ref_attr_name in given:
            bound.attribute.add().CopyFrom(given[attribute.ref_attr_name])
            bound.attribute[-1].name = attribute.name
    return bound
