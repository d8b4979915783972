"""One PyTorch module to many deployment formats, each proven against PyTorch and timed.

Importing this package imports no framework; each is imported by the function that uses it.
"""

from polyexport.capture.processing import Processing
from polyexport.engine.engine import Engine
from polyexport.engine.export import export
from polyexport.engine.options import Options
from polyexport.engine.request import Request
from polyexport.engine.session import Session
from polyexport.errors import BadRequest, CannotRun, ExportFailed, PolyexportError, ToolMissing, UnknownFormat
from polyexport.format import Format, Loaded, Observed, Route, Snippet
from polyexport.formats import known as _known
from polyexport.load import load
from polyexport.measure.budget import Budget
from polyexport.measure.tolerance import Tolerance
from polyexport.report.outcome import Checkpoint, Outcome
from polyexport.report.report import Report
from polyexport.spec import Arrays, ExportSpec, Runner, TensorSpec
from polyexport.workers.toolchain import Toolchain

__all__ = [
    "FORMATS",
    "Arrays",
    "BadRequest",
    "Budget",
    "CannotRun",
    "Checkpoint",
    "Engine",
    "ExportFailed",
    "ExportSpec",
    "Format",
    "Loaded",
    "Observed",
    "Options",
    "Outcome",
    "PolyexportError",
    "Processing",
    "Report",
    "Request",
    "Route",
    "Runner",
    "Session",
    "Snippet",
    "TensorSpec",
    "Tolerance",
    "ToolMissing",
    "Toolchain",
    "UnknownFormat",
    "export",
    "load",
]

FORMATS = _known()
"""Every format by name."""
