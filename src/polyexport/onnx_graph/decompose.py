"""Decomposes operators of an ONNX graph into others, for runtimes that lack them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_DOMAIN = "polyexport"


def _every(node: onnx.NodeProto) -> bool:
    return True


def decomposed(
    model: onnx.ModelProto, functions: Iterable[str], applies: Callable[[onnx.NodeProto], bool] = _every
) -> onnx.ModelProto:
    """The model with each operator replaced by the function of the same name in `functions`.

    Args:
        model: The model, which is changed.
        functions: In ONNX's text form, `Not (x) => (y) { … }`. One is used if it has as many inputs as the node.
        applies: Whether a node is to be replaced.
    """
    import onnx
    from onnx import inliner, parser

    version = next(each.version for each in model.opset_import if not each.domain)
    header = f'<domain: "{_DOMAIN}", opset_import: ["" : {version}]> '
    parsed = {each.name: each for each in (parser.parse_function(header + text) for text in functions)}
    for node in model.graph.node:
        function = parsed.get(node.op_type)
        if function is not None and len(node.input) == len(function.input) and applies(node):
            node.domain = _DOMAIN
    model.functions.extend(parsed.values())
    model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return inliner.inline_local_functions(model)
