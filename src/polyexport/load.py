"""Load any exported artifact as a function of named arrays.

Next to each artifact is a `polyexport.json` that says what it is, so that a format's folder can be copied, renamed and
downloaded by itself. No runtime reads it, and the artifact's size and SHA-256 exclude it.
"""

from __future__ import annotations

import atexit
import posixpath
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest, ToolMissing
from polyexport.format import Format, Loaded
from polyexport.formats import known
from polyexport.report.folders import BEST, DESCRIPTION, check_artifact_links, followed, inside
from polyexport.report.outcome import Checkpoint, Outcome, State
from polyexport.serialization import read_record
from polyexport.spec import ExportSpec, Precision, TensorSpec
from polyexport.workers.toolchain import find


@dataclass(frozen=True, slots=True)
class Description:
    """What an artifact is: its format, its outcome, its own signature, and PyTorch's.

    `verified_by` is what ran it, if that was not its own runtime here: a stand-in, or other machines.
    """

    format: str
    precision: Precision
    state: State
    reason: str
    checkpoint: Checkpoint
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    spec: ExportSpec
    verified_by: tuple[str, ...] = ()

    @staticmethod
    def of(outcome: Outcome, checkpoint: Checkpoint, spec: ExportSpec) -> Description:
        """The description of a format's artifact, stored next to it; `spec` is PyTorch's signature."""
        # artifacts are shared, and should not tell the folder
        checkpoint = replace(checkpoint, path=Path(checkpoint.path).name)
        spec = replace(spec, calibration=())  # these files stay in the export
        ran = (outcome.parity.verified_by if outcome.parity else None, *(each.verified_by for each in outcome.proofs))
        about = (outcome.format, outcome.precision, outcome.state, outcome.reason, checkpoint)
        return Description(*about, outcome.inputs, outcome.outputs, spec, tuple(dict.fromkeys(filter(None, ran))))

    @property
    def runner_spec(self) -> ExportSpec:
        """The artifact's signature with PyTorch's names and output dtypes, as it was verified."""
        inputs = zip(self.inputs, self.spec.inputs, strict=True)
        outputs = zip(self.outputs, self.spec.outputs, strict=True)
        return ExportSpec(
            tuple(replace(own, name=its.name) for own, its in inputs),
            tuple(replace(own, name=its.name, dtype=its.dtype) for own, its in outputs),
        )


def load(path: str | Path, *, threads: int = 1) -> Loaded:
    """Open an exported format, `load("exports/best/onnx")`, in its own runtime.

    Some formats run code from the file (a `.pt2` may hold a pickle), so load only what you trust.

    Args:
        path: A format's folder, in an export or copied from it, or the artifact in it; or its fsspec URL
            (`s3://bucket/exports/best/onnx`), from which it is copied to a temporary folder of this process.
        threads: Number of threads of the runtime.

    Returns:
        A function from named input arrays to named output arrays; the names are in `polyexport.json`. `labels` and
            `metadata` are what was embedded, and `shortfall` is what it lacks of what was asked for, such as a
            processing step that you have to run.

    Raises:
        BadRequest: there is no exported format at `path`.
        ToolMissing: this environment lacks the format's runtime.
        CannotRun: nothing on this machine can run it.
    """
    folder, about, each = described(_here(path))
    try:
        opened = each.open(folder / each.artifact, about.runner_spec, threads=threads)
    except ModuleNotFoundError as error:
        needed = ", ".join(find(each.runtime or each.routes[0].toolchain).requirements)
        raise ToolMissing(
            f"{each.name} runs in an environment with {needed}; {error.name} is not installed here: install it, or run "
            f"the artifact in its own environment by `polyexport run {folder} --inputs inputs.npz`"
        ) from error
    shortfall = about.reason if about.state == "degraded" else opened.shortfall
    return replace(opened, labels=about.spec.labels, metadata=about.spec.metadata, shortfall=shortfall)


def _here(path: str | Path) -> Path:
    """The path on this machine: of what is at a URL, a copy that is kept until this process ends."""
    if "://" not in str(path):
        return Path(path)
    import fsspec

    filesystem, root = fsspec.url_to_fs(str(path))
    return Path(root) if "file" in filesystem.protocol else _fetched(filesystem, root, str(path))


def _fetched(filesystem: Any, root: str, url: str) -> Path:
    """A copy of the format's folder `root`: a runtime may read it at any time."""
    root = _pointed(filesystem, root.rstrip("/"))
    remote = next((each for each in (root, posixpath.dirname(root)) if filesystem.exists(f"{each}/{DESCRIPTION}")), "")
    if not remote:
        raise BadRequest(f"{url} is not a format of an export: there is no {DESCRIPTION} next to the artifact")
    folder = Path(tempfile.mkdtemp(prefix="polyexport-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in filesystem.find(remote):
        target = inside(folder, posixpath.relpath(file, remote))
        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(file, str(target))
    return folder if remote == root else folder / posixpath.relpath(root, remote)


def _pointed(filesystem: Any, path: str) -> str:
    """`path`, in which `best` is resolved: a file with the name of the newest export, next to it."""
    parent, found, rest = path.rpartition(f"/{BEST}/")
    if not found or not filesystem.isfile(f"{parent}/{BEST}"):
        return path
    name = filesystem.cat_file(f"{parent}/{BEST}").decode().strip()
    return f"{parent}/{name}/{rest}"


def described(path: Path) -> tuple[Path, Description, Format]:
    """The folder of an exported format, its description, and the format; `path` is the folder or the artifact.

    Raises:
        BadRequest: it is neither, was written by another version, or has a link that leads out of it.
    """
    path = followed(path)
    folder = path if (path / DESCRIPTION).is_file() else path.parent
    if not (folder / DESCRIPTION).is_file():
        raise BadRequest(_what_instead(path))
    check_artifact_links(folder)
    about = read_record(Description, folder / DESCRIPTION)
    each = known().get(about.format)
    if each is None:
        raise BadRequest(f"{folder} is of the format {about.format!r}, which this version does not know")
    artifact = folder / each.artifact
    if path not in (folder, artifact) or not artifact.exists():
        raise BadRequest(f"{path} is not the artifact of {each.name}; that is {artifact}")
    return folder, about, each


def _what_instead(path: Path) -> str:
    """Why `path` cannot be loaded, and what can be."""
    if not path.exists():
        beside = sorted(file.parent.name for file in path.parent.glob(f"*/{DESCRIPTION}"))
        there = (
            f"{path.parent} has {', '.join(beside)}" if beside else "give a format's folder, such as exports/best/onnx"
        )
        return f"there is no {path}; {there}"
    inside = sorted(file.parent for pattern in ("*", f"{BEST}/*") for file in path.glob(f"{pattern}/{DESCRIPTION}"))
    if inside:
        return f"{path} is not a format of an export, but contains some: {', '.join(map(str, inside))}"
    return f"{path} is not a format of an export: there is no {DESCRIPTION} next to the artifact"
