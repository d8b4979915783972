"""Frozen records to JSON and back, for everything that travels between processes or lies on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Turn records, tuples, paths and mappings into what JSON knows; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: encode(getattr(value, name)) for name, key in _keys(type(value)).items()}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _keys(kind: Any) -> dict[str, str]:
    """The fields of a record and what JSON calls them: by their `json` in the metadata, where False leaves one out."""
    named = {field.name: field.metadata.get("json", field.name) for field in dataclasses.fields(kind)}
    return {name: key for name, key in named.items() if key}


def decode(kind: type[T], data: Any) -> T:
    """Build a record of type `kind` from decoded JSON; unknown keys are dropped, so old readers read new files."""
    return typing.cast(T, _decode(kind, data))


def _decode(kind: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {name: data[key] for name, key in _keys(kind).items() if key in data}
        return typing.cast(Any, kind)(**{name: _decode(hints[name], value) for name, value in known.items()})
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in data)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {arguments[0](key): _decode(arguments[1], item) for key, item in data.items()}
    if kind is Path:
        return Path(data)
    return data


def write_json(path: Path, value: Any) -> None:
    """Write `value` in one step: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(encode(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
