"""Makes our package importable in a toolchain, by its files only: `import bare` before it."""

import sys
import types
from pathlib import Path

HERE = Path(__file__).parent

package = types.ModuleType("polyexport")  # without its __init__, which imports what a toolchain does not have
package.__path__ = [str(HERE.parents[1] / "src" / "polyexport")]
sys.modules["polyexport"] = package
