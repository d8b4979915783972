"""Names the operator that coremltools fails on, with its constants, instead of a bare `KeyError`."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyexport.errors import line


def register() -> None:
    """Make errors of coremltools' translations name the operator, in this process."""
    from coremltools.converters.mil.frontend.torch import ops

    if getattr(ops.convert_single_node, "__module__", "") == __name__:
        return
    translate = ops.convert_single_node

    def convert_single_node(context: Any, node: Any) -> None:
        try:
            translate(context, node)
        except _WORDLESS as error:
            given = ", ".join(_constants(context, node))
            where = f"{node.kind}({given})" if given else node.kind
            why = line(error)
            raise RuntimeError(f"coremltools cannot translate PyTorch's {where}: {why}") from error

    ops.convert_single_node = convert_single_node


_WORDLESS = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""Errors of an operator on unexpected arguments, which say nothing about the model."""


def _constants(context: Any, node: Any) -> list[str]:
    """The constants among an operator's inputs, such as `interpolation_mode=2` if its schema is known."""
    found = [(index, _plain(_value(context, name))) for index, name in enumerate(node.inputs)]
    names = _argument_names(node.kind)
    return [
        f"{names[index]}={value}" if index < len(names) else str(value) for index, value in found if value is not None
    ]


def _value(context: Any, name: Any) -> Any:
    return getattr(context[name], "val", None) if name in context else None


def _plain(value: Any) -> Any:
    """A number, a string or a few numbers as text; None for anything larger."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist() if value.size <= _FEW else None
    return value if isinstance(value, bool | int | float | str) else None


_FEW = 8


def _argument_names(kind: str) -> list[str]:
    import torch

    packet = getattr(torch.ops.aten, kind, None)
    overload = getattr(packet, "default", None) if packet is not None else None
    return [argument.name for argument in overload._schema.arguments] if overload is not None else []
