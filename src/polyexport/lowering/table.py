"""A table of operators: one small function per ONNX operator, found by its name and the model's opset version.

A function takes the node's inputs as `Value`s, None for an optional one that is not given, and the attributes as
keyword arguments with ONNX's defaults. It returns the output: a tensor, a numpy array, a `Value`, or a tuple of these
for several outputs; a list is an ONNX sequence. What the signature says besides:

* a parameter `node` receives the node itself, and a first parameter `ops` the framework's `Backend`;
* an input of the type `Ints` or `Int` must be known before the run, and arrives as Python integers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from polyexport.lowering.backend import Tensor
from polyexport.lowering.value import Value, align, static

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

Ints = Annotated[list[int], "known before the run"]
Int = Annotated[int, "known before the run"]


class UnsupportedOp(Exception):
    """An operator, or a use of one, that the lowering does not support; the message names node and opset."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The function of one operator.

    Attributes:
        function: See the module's docstring.
        signature: The function's signature.
        known: The inputs that must be known before the run, and whether each is a single integer.
        narrow: Whether it supports all element types itself, even those with few kernels in the framework.
    """

    function: Function
    signature: inspect.Signature
    known: Mapping[str, bool]
    narrow: bool

    def takes(self, name: str) -> bool:
        """Whether the function has a parameter."""
        return name in self.signature.parameters


class Operators:
    """The operators of one framework, and those shared by all frameworks.

    Args:
        shared: The table of shared operators, complete when this one is made.
    """

    def __init__(self, shared: Operators | None = None) -> None:
        self._table: dict[tuple[str, str], dict[int, Operator]] = {}
        if shared is not None:
            self._table = {name: dict(versions) for name, versions in shared._table.items()}

    def op(self, *names: str, since: int = 1, domain: str = "", narrow: bool = False) -> Callable[[F], F]:
        """Register the function of one operator, or of several that differ only in their name.

        Raises:
            ValueError: one of them already has a function for this opset version.
        """

        def declare(function: F) -> F:
            self._add(names, since, domain, _operator(function, function, narrow))
            return function

        return declare

    def elementwise(self, *names: str, since: int = 1) -> Callable[[F], F]:
        """Register an element-wise operator: its function gets tensors that are all stored in one order."""

        def declare(function: F) -> F:
            self._add(names, since, "", _operator(_aligned(function), function, False))
            return function

        return declare

    def functions(self, **named: Callable[[Tensor], Tensor]) -> None:
        """Register element-wise functions of one tensor, by their operators' names."""
        for name, function in named.items():
            self.elementwise(name)(_unary(function))

    def _add(self, names: tuple[str, ...], since: int, domain: str, operator: Operator) -> None:
        for name in names:
            versions = self._table.setdefault((domain, name), {})
            if since in versions:
                raise ValueError(f"the operator {name} has a function since opset {since} already")
            versions[since] = operator

    def find(self, domain: str, name: str, version: int) -> Operator | None:
        """The function for an operator as the opset `version` defines it."""
        versions = self._table.get((domain, name), {})
        fitting = [since for since in versions if since <= version]
        return versions[max(fitting)] if fitting else None


SHARED = Operators()
"""The operators that are written once, over the primitives of a `Backend`."""


def _operator(function: Function, declared: Function, narrow: bool) -> Operator:
    hints = get_type_hints(declared, include_extras=True)
    kinds = {name: {hint, *get_args(hint)} for name, hint in hints.items()} if hints else {}
    known = {name: Int in kind for name, kind in kinds.items() if Int in kind or Ints in kind}
    return Operator(function, inspect.signature(declared), known, narrow)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of one tensor, since frameworks' functions have further parameters."""

    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def _aligned(function: Function) -> Function:
    leading = int("ops" in inspect.signature(function).parameters)

    def apply(*arguments: Any, **attributes: Any) -> Value:
        values: tuple[Value, ...] = arguments[leading:]
        tensors, order = align(values)
        return Value(values[0].backend, function(*arguments[:leading], *tensors, **attributes), order)

    return apply


def integers(value: Value, single: bool) -> int | list[int] | None:
    """The content of an input that must be known before the run; None if it is not."""
    found = static(value)
    return found[0] if single and found else found
