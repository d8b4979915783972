"""A kit: a folder that verifies and times an artifact on a machine that has only its runtime.

```
digits-coreml-kit/
    README.md               five lines: what to install, what to run, what to send back
    prove.pyz               the program, one file: `polyexport.kit.prove` and what it imports, unchanged
    kit.json                what to verify (see `Kit`)
    coreml/                 the artifact
    validation_batch.npz    inputs with PyTorch's outputs; further batches in source/
```
"""

from __future__ import annotations

import ast
import io
import pkgutil
import shutil
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import polyexport.formats
from polyexport.errors import BadRequest
from polyexport.format import Format
from polyexport.formats import known
from polyexport.kit.prove import KIT, PROGRAM, PROOF, Kit
from polyexport.load import described
from polyexport.measure.verification import fingerprint, sha256
from polyexport.report import manifest
from polyexport.report.folders import DESCRIPTION, inside
from polyexport.report.report import Report
from polyexport.serialization import write_json
from polyexport.workers.job import proofs

_PACKAGE = Path(polyexport.formats.__file__).parents[1]

_MAIN = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("this needs Python 3.10 or newer, but this is " + sys.version.split()[0])

from pathlib import Path

try:
    from polyexport.kit.prove import main
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed: pip install PACKAGES")

sys.exit(main(Path(sys.argv[0]).resolve().parent))
"""

_README = """\
This folder verifies an artifact of the format {format} on the machine that it is made for, and times it there.

1. Copy it there. It needs Python 3.10 or newer, but nothing of the environment that made it.
2. `pip install {packages}`
3. `python {program}` prints the result and writes `{proof}`.
4. Copy `{proof}` back to the machine with the export.
5. `polyexport accept {proof}` there adds the machine and its result to the export's report.
"""


def make(path: Path, into: Path | None = None, *, archive: bool = False) -> Path:
    """Make the kit of an artifact.

    Args:
        path: A format's folder in an export, or the artifact in it.
        into: The folder or archive to make; by default `<export>-<format>-kit` in the working folder.
        archive: Whether to make a `.zip` of it instead of a folder.

    Returns:
        Path of the kit.

    Raises:
        BadRequest: there is no exported artifact at `path`, its format has no kit, or `into` exists and is not a kit.
    """
    folder, about, each = described(path)
    if each.on_device is None:
        having = ", ".join(name for name, other in known().items() if other.on_device)
        raise BadRequest(f"{each.name} has no kit; formats with one: {having}")
    export = folder.resolve().parent
    exported = manifest.load(export).of(each.name)
    spec = about.runner_spec
    batches = proofs(exported.batches, dynamic=spec.is_dynamic, made_up=each.precision == "float32")
    files = [*(batch.path for batch in batches), *filter(None, [exported.noise])]
    data = {file: sha256(inside(export, file)) for file in files}
    _, found = fingerprint(folder, DESCRIPTION)
    outcome = Report.load(export)[each.name]
    if outcome.by_budget and outcome.parity is not None and not outcome.parity.passed:
        raise BadRequest(f"{each.name} is {outcome.state} by your own metric; a kit cannot measure that")
    made_as = outcome.artifact
    if made_as is not None and made_as.sha256 not in ("", found):  # an artifact that could not be run has no hash
        raise BadRequest(f"the artifact in {folder} was changed after the export: its SHA-256 differs")
    artifact = f"{each.name}/{each.artifact}" if each.artifact != "." else each.name
    kit = Kit(each.name, artifact, found, about.checkpoint, spec, batches, exported.noise, data)
    into = into or Path(f"{export.name}-{each.name}-kit")
    made = into.with_name(into.name.removesuffix(".zip"))
    target = made.with_name(f"{made.name}.zip") if archive else made
    for taken in {made, target}:
        if taken.exists() and not _is_kit(taken):
            raise BadRequest(f"{taken} exists and is not a kit; give another name with --into")
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder, made / each.name)
    for file in files:
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(export / file, made / file)
    write_json(made / KIT, kit)
    packages = " ".join([*each.on_device.packages, "numpy"])
    (made / PROGRAM).write_bytes(program(each, packages))
    readme = _README.format(format=each.name, packages=packages, program=PROGRAM, proof=PROOF)
    (made / "README.md").write_text(readme, encoding="utf-8")
    if archive:
        shutil.make_archive(str(made), "zip", made.parent, made.name)
        shutil.rmtree(made)
    return target


def _is_kit(path: Path) -> bool:
    return (path / KIT).is_file() or (path.is_file() and zipfile.is_zipfile(path))


def program(each: Format, packages: str) -> bytes:
    """The program as one file that Python runs: a zip archive of polyexport's own modules."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py"), _MAIN.replace("PACKAGES", packages))
        archive.writestr(zipfile.ZipInfo("polyexport/__init__.py"), "")
        for file in sorted(_closure(*_files("polyexport.kit.prove"), *_files(_declaring(each)))):
            name = file.relative_to(_PACKAGE.parent).as_posix()
            archive.writestr(zipfile.ZipInfo(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return held.getvalue()


def _declaring(each: Format) -> str:
    """The name of the module that declares a format."""
    for info in pkgutil.iter_modules(polyexport.formats.__path__, "polyexport.formats."):
        module = import_module(info.name)
        if each in (getattr(module, "FORMATS", None) or (module.FORMAT,)):
            return info.name
    raise BadRequest(f"{each.name} is your own format, which has no kit")


def _closure(*files: Path) -> set[Path]:
    """The files, and all files of polyexport that importing them imports, without its own `__init__.py`."""
    found: set[Path] = set()
    todo = [*files]
    while todo:
        if (file := todo.pop()) not in found:
            found.add(file)
            todo += _imported(file)
    return found


def _imported(file: Path) -> Iterator[Path]:
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("polyexport."):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                yield from _files(name)


def _files(module: str) -> Iterator[Path]:
    """The file of a module and the `__init__.py` of its packages; none if it is not a module."""
    inner = module.split(".")[1:]
    for depth in range(1, len(inner) + 1):
        place = _PACKAGE.joinpath(*inner[:depth])
        yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())
