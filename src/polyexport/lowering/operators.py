"""A table of operators: one small function per ONNX operator, found by its name and the model's opset version.

A function takes the node's inputs as `Value`s, None for an optional one that is not given, and the attributes as
keyword arguments with ONNX's defaults. It returns the output: a tensor, a numpy array, a `Value`, or a tuple of these
for several outputs; a list is an ONNX sequence. A parameter called `node` receives the node itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from polyexport.lowering.value import Value, align

if TYPE_CHECKING:
    from polyexport.lowering.graph import Node

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class UnsupportedOp(Exception):
    """An operator, or a use of one, that the lowering does not carry; the message names node and opset."""


class Operators:
    """The operators that one target framework has functions for."""

    def __init__(self) -> None:
        self._table: dict[tuple[str, str], list[tuple[int, Function]]] = {}

    def op(self, *names: str, since: int = 1, domain: str = "") -> Callable[[F], F]:
        """Declare the function of one operator, or of several that differ in nothing but their name."""

        def declare(function: F) -> F:
            for name in names:
                entries = self._table.setdefault((domain, name), [])
                entries.append((since, function))
                entries.sort(key=lambda entry: entry[0])
            return function

        return declare

    def elementwise(self, *names: str, since: int = 1) -> Callable[[Function], Function]:
        """Declare an operator that works element by element: its function gets tensors, stored all in one order."""

        def declare(function: Function) -> Function:
            def aligned(*values: Value, **attributes: Any) -> Value:
                tensors, order = align(values)
                return Value(values[0].framework, function(*tensors, **attributes), order)

            aligned.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # inspect reads it
            self.op(*names, since=since)(aligned)
            return function

        return declare

    def find(self, domain: str, name: str, version: int) -> Function | None:
        """The function for an operator as the opset `version` defines it."""
        fitting = [function for since, function in self._table.get((domain, name), ()) if since <= version]
        return fitting[-1] if fitting else None


def call(function: Function, node: Node, inputs: list[Any]) -> Any:
    """Call an operator's function on a node.

    Raises:
        UnsupportedOp: the node has inputs or attributes that the function does not know.
    """
    signature = inspect.signature(function)
    attributes = dict(node.attributes)
    if "node" in signature.parameters:
        attributes["node"] = node
    try:
        bound = signature.bind(*inputs, **attributes)
    except TypeError as error:
        raise UnsupportedOp(f"{node}: {error}") from None
    return function(*bound.args, **bound.kwargs)
