"""A toolchain's lock file: every package that its requirements lead to, at one version, with the hashes of its files.

`toolchains/NAME.lock` is written by `make lock`, by uv's universal resolution: for Linux, macOS and Windows, and for
every Python that the toolchain allows. Its first lines are comments that `read` understands:

    # polyexport: bytes 123       the disk space of its environment, measured when the lock was made
    # polyexport: needs NAME >=1  a package, and the versions that others in the lock allow
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ALWAYS = ("numpy", "cloudpickle")
"""Packages in every environment: a user's own `Format` is pickled by value."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file.

    Attributes:
        text: Requirements with hashes, as pip and uv read them.
        bytes: Disk space of its environment, as measured when the lock was made.
        needs: Name and PEP 440 specifier of each package that others require, torch included.
    """

    text: str
    bytes: int = 0
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def packages(self) -> tuple[Requirement, ...]:
        """The pinned requirements, with their markers; one for each range of Python versions."""
        return tuple(Requirement(pin) for pin in _pins(self.text))

    @property
    def here(self) -> dict[str, str]:
        """Name and version of what this Python on this platform installs."""
        found = (pin for pin in self.packages if pin.marker is None or pin.marker.evaluate())
        return {pin.name: next(iter(pin.specifier)).version for pin in found}

    def without(self, names: Iterable[str]) -> str:
        """The text without these packages."""
        left_out = set(names)
        return "".join(text for pin, text in _pins(self.text).items() if Requirement(pin).name not in left_out)


def read(text: str) -> Lock:
    """A lock file's content as a record."""
    size = re.search(r"^# polyexport: bytes (\d+)$", text, re.MULTILINE)
    needs = tuple(re.findall(r"^# polyexport: needs (\S+) ?(.*)$", text, re.MULTILINE))
    return Lock(re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), int(size.group(1)) if size else 0, needs)


def write(lock: Lock) -> str:
    """The content of a lock file."""
    needs = [f"# polyexport: needs {name} {need}".rstrip() for name, need in lock.needs]
    return "\n".join(["# made by `make lock`", f"# polyexport: bytes {lock.bytes}", *needs, lock.text])


def overrides(requirements: Iterable[str], unheard: Iterable[str]) -> str:
    """Overrides for uv: packages in `unheard` get the version that `requirements` ask for, or are left out."""
    ours = list(requirements)
    named = {name: [line for line in ours if Requirement(line).name == name] for name in unheard}
    return "".join("".join(f"{line}\n" for line in found) or left_out(name) for name, found in named.items())


def left_out(name: str) -> str:
    """An override for uv that leaves out a package."""
    return f'{name} ; python_version < "0"\n'


@cache
def provided(lock: Lock) -> Mapping[str, str]:
    """Name and version of the locked packages that the training environment has, at compatible versions.

    They need not be installed again, so the user's module finds the versions that it was written for.
    """
    installed = {name: found for name, _ in lock.needs if (found := _installed(name)) is not None}
    fits = {name for name, need in lock.needs if name in installed and _contains(need, installed[name])}
    locked = lock.here
    while wrong := {name for name in fits if not _content(name, fits, locked)}:
        fits -= wrong
    return {name: installed[name] for name in sorted(fits & locked.keys())}


def misfit(lock: Lock, name: str) -> str:
    """Why a package of the training environment does not satisfy the lock; empty if it does."""
    need = dict(lock.needs).get(name, "")
    found = _installed(name)
    return "" if found is None or _contains(need, found) else f"it needs {name} {need}, and this is {name} {found}"


def _pins(text: str) -> dict[str, str]:
    """The requirement and full text of each entry, whose continuation lines begin with a space."""
    entries = re.findall(r"^\S.*\n(?:[ \t]+.*\n)*", text, re.MULTILINE)
    return {entry.split("\\\n")[0].split(" --hash")[0].strip(): entry for entry in entries}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _contains(need: str, version: str) -> bool:
    return SpecifierSet(need).contains(version, prereleases=True)


def _content(name: str, beside: Iterable[str], locked: Mapping[str, str]) -> bool:
    """Whether a package of the training environment can be kept if all locked packages but `beside` are installed."""
    asked = (Requirement(line) for line in metadata.requires(name) or ())
    needed = (each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""}))
    over = ((each, canonicalize_name(each.name)) for each in needed)
    return all(
        called in beside or called not in locked or _contains(str(each.specifier), locked[called])
        for each, called in over
    )
