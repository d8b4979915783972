"""Where a report can go: one file per place. A sink is a function of the report, called once it is complete."""

from __future__ import annotations

from collections.abc import Callable

from polyexport.report.report import Report

Sink = Callable[[Report], None]
"""Takes a complete report; what it raises is told to the user and harms nobody."""
