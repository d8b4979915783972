"""Any finished artifact back as a callable on named arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from polyexport.errors import BadRequest, ToolMissing
from polyexport.format import Runner
from polyexport.formats import known
from polyexport.report.folders import followed
from polyexport.serialization import decode, read_json
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.workers.toolchain import find


def load(path: str | Path, *, threads: int = 1) -> Runner:
    """Open an exported format, `load("exports/best/onnx")`, in its own runtime.

    Args:
        path: A format's folder inside an export.
        threads: Of the runtime.

    Returns:
        A function from named input arrays to named output arrays; the names stand in `manifest.json`.

    Raises:
        BadRequest: there is no export at `path`.
        ToolMissing: this environment lacks the format's runtime.
        CannotRun: nothing on this machine can run it.
    """
    folder = followed(Path(path))
    manifest_path = folder.parent / "manifest.json"
    if not manifest_path.is_file():
        raise BadRequest(f"{folder} is not a format of an export: {manifest_path} does not exist")
    manifest = read_json(manifest_path)
    artifacts = manifest["artifacts"]
    if folder.name not in artifacts:
        raise BadRequest(f"{folder} was not exported; {folder.parent} has {', '.join(artifacts) or 'nothing'}")
    if folder.name not in known():
        raise BadRequest(f"{folder.name} is not a format of this version; known formats: {', '.join(known())}")
    each, about = known()[folder.name], artifacts[folder.name]
    if each.load is None:
        raise BadRequest(f"{each.name} cannot be run on any host")
    inputs, outputs = (tuple(decode(TensorSpec, tensor) for tensor in about[side]) for side in ("inputs", "outputs"))
    module = decode(ExportSpec, manifest["spec"])  # a runner has its names and answers in its dtypes, as was verified
    inputs = tuple(replace(own, name=its.name) for own, its in zip(inputs, module.inputs, strict=True))
    outputs = tuple(
        replace(own, name=its.name, dtype=its.dtype) for own, its in zip(outputs, module.outputs, strict=True)
    )
    try:
        return each.load(folder / each.artifact, ExportSpec(inputs, outputs), threads=threads)
    except ModuleNotFoundError as error:
        needed = ", ".join(find(each.runtime or each.routes[0].toolchain).requirements)
        raise ToolMissing(f"{each.name} runs in an environment with {needed}; here is no {error.name}") from error
