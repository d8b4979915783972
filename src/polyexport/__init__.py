"""polyexport: one PyTorch module to many deployment formats, each proven against PyTorch and timed.

Importing this package imports no framework; each is imported by the function that uses it.
"""

from polyexport.engine import Engine as Engine
from polyexport.engine import Request as Request
from polyexport.engine import export as export
from polyexport.errors import BadRequest as BadRequest
from polyexport.errors import CannotRun as CannotRun
from polyexport.errors import ExportFailed as ExportFailed
from polyexport.errors import PolyexportError as PolyexportError
from polyexport.errors import ToolMissing as ToolMissing
from polyexport.errors import UnknownFormat as UnknownFormat
from polyexport.format import Format as Format
from polyexport.format import Route as Route
from polyexport.format import Runner as Runner
from polyexport.format import Snippet as Snippet
from polyexport.format import Tolerance as Tolerance
from polyexport.formats import known as _known
from polyexport.loading import load as load
from polyexport.report import Outcome as Outcome
from polyexport.report import Report as Report
from polyexport.spec import Arrays as Arrays
from polyexport.spec import ExportSpec as ExportSpec
from polyexport.spec import TensorSpec as TensorSpec
from polyexport.toolchain import Toolchain as Toolchain

FORMATS = _known()
"""Every format by name."""
