"""The JSON Schema of `report.json`, which ships with the package.

`python -m polyexport.report.schema` writes the file anew, after a change of the records.
"""

from __future__ import annotations

import json
from pathlib import Path

from polyexport.report.report import Report
from polyexport.serialization import schema

FILE = Path(__file__).with_name("report.schema.json")


def text() -> str:
    """What the file holds."""
    return json.dumps(schema(Report), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
