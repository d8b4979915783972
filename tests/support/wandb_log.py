"""Reads an offline W&B run back from its `.wandb` file: LevelDB log blocks of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class Artifact:
    name: str
    type: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]
    files: dict[str, int]


@dataclass
class Run:
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)


def records(path: Path) -> Iterator[bytes]:
    data, position, whole = path.read_bytes(), _FILE_HEADER, b""
    assert data[:4] == b":W&B", f"{path} is not a W&B log"
    while position + _CHUNK_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:
            position += left
            continue
        crc, length, kind = struct.unpack("<IHB", data[position : position + _CHUNK_HEADER])
        chunk = data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        assert zlib.crc32(bytes([kind]) + chunk) & 0xFFFFFFFF == crc, f"{path} is damaged at {position}"
        position += _CHUNK_HEADER + length
        whole = chunk if kind in (_FULL, _FIRST) else whole + chunk
        if kind in (_FULL, _LAST):
            yield whole


def read(path: Path) -> Run:
    from wandb.proto.wandb_internal_pb2 import Record

    run = Run()
    for raw in records(path):
        record = Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "artifact" and record.artifact.type == "model":
            found = record.artifact
            files = {entry.path: entry.size for entry in found.manifest.contents}
            metadata = json.loads(found.metadata or "{}")
            run.artifacts.append(Artifact(found.name, found.type, tuple(found.aliases), metadata, files))
    return run


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
