"""Which formats have to be made for the ones asked for, in which order and in which toolchains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from polyexport.errors import BadRequest, UnknownFormat
from polyexport.format import MODULE, Format
from polyexport.formats import known
from polyexport.workers.toolchain import Toolchain, find


def steps(formats: Sequence[Format]) -> Mapping[str, Format]:
    """The formats asked for and all that their routes may read, upstream first.

    A `Format` value among `formats` replaces the built-in one of the same name.

    Raises:
        UnknownFormat: a route reads a format that does not exist.
        BadRequest: routes form a circle.
    """
    asked = {each.name: each for each in formats}
    graph: dict[str, set[str]] = {}
    waiting = list(asked)
    while waiting:
        name = waiting.pop()
        if name in graph:
            continue
        graph[name] = {route.upstream for route in _format(name, asked).routes} - {MODULE}
        waiting += graph[name]
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise BadRequest(f"routes form a circle, each reading the next: {' -> '.join(error.args[1])}") from None
    return {name: _format(name, asked) for name in order}


def toolchains(formats: Sequence[Format]) -> Mapping[str, tuple[Toolchain, ...]]:
    """For each format of the plan the toolchains that its first route and its runtime need."""
    needed: dict[str, tuple[Toolchain, ...]] = {}
    for name, each in steps(formats).items():
        names = [each.routes[0].toolchain, each.runtime or each.routes[0].toolchain]
        needed[name] = tuple(find(toolchain) for toolchain in dict.fromkeys(names))
    return needed


def _format(name: str, asked: Mapping[str, Format]) -> Format:
    found = asked.get(name) or known().get(name)
    if found is None:
        raise UnknownFormat(f"a route reads the format {name!r}, which does not exist; known: {', '.join(known())}")
    return found
