"""The formats: one file each, found by file name, declared on its last lines as `FORMAT = Format(...)`.

A file may declare several precisions of one format: `FORMATS = (Format(...), Format(...))`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import get_args

from polyexport.errors import UnknownFormat
from polyexport.format import Format, Target


@cache
def known() -> Mapping[str, Format]:
    """Every format by name, in alphabetical order."""
    found: dict[str, Format] = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for declared in getattr(module, "FORMATS", None) or (module.FORMAT,):
            found[declared.name] = declared
    return MappingProxyType(dict(sorted(found.items())))


def by_target(formats: Iterable[Format]) -> dict[Target, tuple[Format, ...]]:
    """Formats by target, in `Target`'s order; a format may be in several groups."""
    given = tuple(formats)
    groups = {target: tuple(each for each in given if target in each.targets) for target in get_args(Target)}
    return {target: group for target, group in groups.items() if group}


def resolve(formats: Iterable[str | Format]) -> tuple[Format, ...]:
    """Names, aliases and `Format` values to formats, in the order given, each once.

    Raises:
        UnknownFormat: a name is unknown; the message lists the known ones.
    """
    by_alias = {alias: each for each in known().values() for alias in each.aliases}
    if isinstance(formats, str | Format):
        formats = (formats,)
    if not isinstance(formats, Iterable):
        raise UnknownFormat(f"formats={formats!r}; give a list of names; known formats: {', '.join(known())}")
    chosen: dict[str, Format] = {}
    for given in formats:
        named = {**by_alias, **known()} if isinstance(given, str) else {}
        each = given if isinstance(given, Format) else named.get(str(given))
        if each is None:
            names = ", ".join(known())
            aliases = ", ".join(f"{alias} = {each.name}" for alias, each in sorted(by_alias.items()))
            near = get_close_matches(str(given).lower(), named, 1)
            meant = _family(str(given), by_alias) or (f"did you mean {near[0]!r}? " if near else "")
            raise UnknownFormat(f"no format {given!r}; {meant}known formats: {names} (aliases: {aliases})")
        chosen[each.name] = each
    if not chosen:
        raise UnknownFormat(f"no formats were given; known formats: {', '.join(known())}")
    return tuple(chosen.values())


def _family(given: str, by_alias: Mapping[str, Format]) -> str:
    """A message on the precisions of the format whose name `given` begins with; empty if there is none."""
    base = given.rpartition("-")[0]
    found = known().get(base) or by_alias.get(base)
    if found is None:
        return ""
    return f"{found.name} exists as {', '.join(name for name in known() if f'{name}-'.startswith(f'{found.name}-'))}; "
