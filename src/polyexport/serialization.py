"""Frozen records to JSON and back, for everything that is sent between processes or stored on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from polyexport.errors import BadRequest, line

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Turn records, tuples, paths and mappings into JSON values; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: encode(getattr(value, name)) for name, key in _keys(type(value)).items()}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return os.fsencode(value.as_posix()).decode("utf-8", "surrogateescape")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _keys(kind: Any) -> dict[str, str]:
    """The fields of a record and their JSON keys: `json` in a field's metadata is its key, or False to leave it out."""
    named = {field.name: field.metadata.get("json", field.name) for field in dataclasses.fields(kind)}
    return {name: key for name, key in named.items() if key}


def decode(kind: type[T], data: Any) -> T:
    """Build a record of type `kind` from decoded JSON; unknown keys are dropped, so old readers read new files.

    A null where a float belongs becomes NaN, which JSON lacks.

    Raises:
        TypeError: a value is not of its field's type, or a field is missing; the message has the path to it.
    """
    return typing.cast(T, _decode(kind, data, kind.__name__))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        return _union(arguments, data, where)
    if origin is typing.Literal:
        return _checked(data in arguments, data, where, " or ".join(map(repr, arguments)))
    if origin is tuple:
        items = _checked(isinstance(data, list | tuple), data, where, "a list")
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        entries = _checked(isinstance(data, Mapping), data, where, "an object").items()
        return {arguments[0](key): _decode(arguments[1], item, f"{where}.{key}") for key, item in entries}
    if kind is Path:
        text = _checked(isinstance(data, str), data, where, "a path")
        return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))
    if kind is float:
        number = isinstance(data, int | float) and not isinstance(data, bool)
        _checked(data is None or (number and abs(data) <= _LARGEST), data, where, "a number")
        return math.nan if data is None else data
    if kind in (int, str, bool):
        fits = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
        fits = fits and (kind is not int or abs(data) <= _LARGEST)
        return _checked(fits, data, where, _WORDS[kind])
    return data


_LARGEST = sys.float_info.max  # larger integers cannot be formatted as numbers

_WORDS = {int: "an integer", str: "a string", bool: "true or false"}


def _record(kind: Any, data: Any, where: str) -> Any:
    given = _checked(isinstance(data, Mapping), data, where, "an object")
    hints, keys = typing.get_type_hints(kind), _keys(kind)
    known = {name: _decode(hints[name], given[key], f"{where}.{key}") for name, key in keys.items() if key in given}
    missing = [keys[name] for name in _required(kind) if name not in known]
    if missing:
        raise TypeError(f"{where} lacks {', '.join(missing)}")
    return kind(**known)


def _required(kind: Any) -> list[str]:
    """The fields of a record that have no default."""
    none = dataclasses.MISSING
    return [field.name for field in dataclasses.fields(kind) if field.default is field.default_factory is none]


def _union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    """Decode by the first member of a union whose type fits."""
    if data is None and type(None) in arguments:
        return None
    reasons = []
    for member in (each for each in arguments if each is not type(None)):
        try:
            return _decode(member, data, where)
        except TypeError as error:
            reasons.append(str(error))
    raise TypeError(reasons[0])


def _checked(fits: bool, data: Any, where: str, wanted: str) -> Any:
    if not fits:
        raise TypeError(f"{where} is {repr(data)[:80]}, not {wanted}")
    return data


def schema(kind: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of an encoded record.

    https://json-schema.org/draft/2020-12/schema
    """
    definitions: dict[str, Any] = {}
    root = _schema(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.__name__, **root} | {
        "$defs": dict(sorted(definitions.items()))
    }


_JSON_TYPES = {int: "integer", str: "string", bool: "boolean", Path: "string", type(None): "null"}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        name = typing.cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # a record may contain itself
            hints, keys = typing.get_type_hints(kind), _keys(kind)
            definitions[name] = {
                "type": "object",
                "properties": {key: _schema(hints[field], definitions) for field, key in keys.items()},
                "required": [keys[field] for field in _required(kind)],
            }
        return {"$ref": f"#/$defs/{name}"}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(member, definitions) for member in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if kind is float:
        return {"type": ["number", "null"]}  # null is NaN or infinity
    return {"type": _JSON_TYPES[kind]} if kind in _JSON_TYPES else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that is at `path` once it is written, for `torch.save` and the like; hard links keep the old content.

    PyTorch's archive writer ends the process (SIGABRT) if a write fails, as on a full disk. So `write` keeps the error,
    and this raises it.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as opened:
            file = _KeepsErrors(opened)
            yield cast(IO[bytes], file)
            if file.error is not None:
                raise file.error
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class _KeepsErrors(io.RawIOBase):
    """Writes to `file`, up to the first error, which it keeps."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:  # it writes what is buffered
            self.error = self.error or error
            return offset

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(encode(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically; a hard link to the old file keeps the old text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        file.write(text.encode(errors="replace"))


def read_record(kind: type[T], path: Path, version: int | None = None) -> T:
    """Read a record from a file; if `version` is given, the record's must be equal.

    Raises:
        BadRequest: it is not JSON, is of another version, or a value in it is missing or of a wrong type.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise BadRequest(f"{path} is not a file")
    try:
        data = read_json(path)
        found = data.get("version") if isinstance(data, Mapping) else None
        if version is not None and isinstance(found, int) and found != version:
            raise BadRequest(f"{path} has version {found}; this release reads version {version}")
        return decode(kind, data)
    except BadRequest:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadRequest(f"{path} cannot be read: {line(error)}") from error


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
