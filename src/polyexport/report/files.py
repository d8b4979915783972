"""The files of a report, in the folder of its export."""

from __future__ import annotations

from polyexport.report.html import page
from polyexport.report.report import Report, markdown
from polyexport.serialization import write_json, write_text


def save(report: Report) -> None:
    """Write `report.json`, `report.md` and `report.html` into the report's folder."""
    write_json(report.folder / "report.json", report)
    write_text(report.folder / "report.md", markdown(report))
    write_text(report.folder / "report.html", page(report))
