"""Places to publish a report to, one file each. A sink is a function that is called with the complete report."""

from __future__ import annotations

from collections.abc import Callable

from polyexport.report.report import Report

Sink = Callable[[Report], None]
"""Takes a complete report; what it raises becomes a warning, and does not stop training."""
