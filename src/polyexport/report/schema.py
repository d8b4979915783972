"""The JSON Schemas of `report.json` and `manifest.json`, which ship with the package.

`python -m polyexport.report.schema` writes both again, after a change of the records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from polyexport.report.manifest import Manifest
from polyexport.report.report import Report
from polyexport.serialization import schema

RECORDS: Mapping[str, type] = {"report.schema.json": Report, "manifest.schema.json": Manifest}
"""The schemas by the names of their files, in this folder."""


def shipped(name: str) -> Path:
    """The path of a schema."""
    return Path(__file__).with_name(name)


def text(name: str) -> str:
    """The content of the file."""
    return json.dumps(schema(RECORDS[name]), indent=2) + "\n"


if __name__ == "__main__":
    for name in RECORDS:
        shipped(name).write_text(text(name), encoding="utf-8")
