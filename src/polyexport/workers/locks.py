"""A toolchain's lock file: every package that its requirements lead to, at one version, with the hashes of its files.

`toolchains/NAME.lock` is written by `make lock`, by uv's universal resolution: for Linux, macOS and Windows, and for
every Python that the toolchain allows. Its first lines are comments that `read` understands:

    # polyexport: bytes 123       what an environment of it takes on the disk, measured when the lock was made
    # polyexport: needs NAME >=1  a package, and what the others in the lock ask of it
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
"""What each environment has, whatever its toolchain asks for: a user's own `Format` travels by value."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file.

    Attributes:
        text: Its requirements with their hashes, as pip and uv read them.
        bytes: What an environment of it takes on the disk where it was made.
        needs: Name and PEP 440 specifier of each package, as the others ask for it, of torch too.
    """

    text: str
    bytes: int = 0
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def packages(self) -> tuple[Requirement, ...]:
        """The pinned requirements, with their markers; a package has one for each range of Pythons."""
        return tuple(Requirement(pin) for pin in _pins(self.text))

    @property
    def here(self) -> dict[str, str]:
        """Name and version of what is installed by this Python on this platform."""
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
    """What `read` reads."""
    needs = [f"# polyexport: needs {name} {need}".rstrip() for name, need in lock.needs]
    return "\n".join(["# made by `make lock`", f"# polyexport: bytes {lock.bytes}", *needs, lock.text])


def overrides(requirements: Iterable[str], unheard: Iterable[str]) -> str:
    """Overrides for uv: of the packages `unheard` only what `requirements` ask for counts, if they ask for any."""
    ours = list(requirements)
    named = {name: [line for line in ours if Requirement(line).name == name] for name in unheard}
    return "".join("".join(f"{line}\n" for line in found) or left_out(name) for name, found in named.items())


def left_out(name: str) -> str:
    """An override for uv that leaves out a package."""
    return f'{name} ; python_version < "0"\n'


@cache
def provided(lock: Lock) -> Mapping[str, str]:
    """Name and version of the locked packages that the training environment has, at versions that fit the others.

    Those need not be installed over it, and so do not hide what the user's module was written for.
    """
    installed = {name: found for name, _ in lock.needs if (found := _installed(name)) is not None}
    fits = {name for name, need in lock.needs if name in installed and _contains(need, installed[name])}
    locked = lock.here
    while wrong := {name for name in fits if not _content(name, fits, locked)}:
        fits -= wrong
    return {name: installed[name] for name in sorted(fits & locked.keys())}


def misfit(lock: Lock, name: str) -> str:
    """What the lock asks of a package of the training environment that it does not have; empty where it is content."""
    need = dict(lock.needs).get(name, "")
    found = _installed(name)
    return "" if found is None or _contains(need, found) else f"it needs {name} {need}, and this is {name} {found}"


def _pins(text: str) -> dict[str, str]:
    """The requirement and whole text of each entry, which goes on in lines that begin with a blank."""
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
    """Whether a package of the training environment can stay, where what is locked comes in but for those `beside`."""
    asked = (Requirement(line) for line in metadata.requires(name) or ())
    needed = (each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""}))
    over = ((each, canonicalize_name(each.name)) for each in needed)
    return all(
        called in beside or called not in locked or _contains(str(each.specifier), locked[called])
        for each, called in over
    )
