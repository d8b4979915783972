"""A module and its inputs from a checkpoint on disk, for exports outside the process that trained it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

import numpy as np

from polyexport.errors import BadRequest, line
from polyexport.formats import known
from polyexport.report.outcome import Checkpoint
from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch


def read(path: Path, *, trust: bool = False) -> Mapping[str, Any]:
    """A Lightning checkpoint or a state dict.

    Args:
        path: What `torch.save` wrote.
        trust: Whether its pickles may run code.

    Raises:
        BadRequest: there is no such file, or it is not a checkpoint.
    """
    import torch

    if not path.is_file():
        raise BadRequest(f"there is no checkpoint {path}")
    if what := _something_else(path):
        raise BadRequest(f"{path} is {what}; an export starts from a Lightning checkpoint or a state dict (torch.save)")
    try:
        blob = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise BadRequest(f"{path} cannot be read: {line(error, 300)}") from None
        raise BadRequest(f"{path} holds more than tensors; if you trust who made it, give --trust") from None
    except Exception as error:  # torch.load raises many types for a file that is not a checkpoint
        raise BadRequest(f"{path} cannot be read: {line(error, 300)}") from None
    if not isinstance(blob, Mapping):
        raise BadRequest(f"{path} holds a {type(blob).__name__}, neither a checkpoint nor a state dict")
    return blob


def _something_else(path: Path) -> str:
    """What the file is if it is clearly not a checkpoint, in words; empty if it may be one."""
    if is_zipfile(path):
        with ZipFile(path) as archive:
            files = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in files:
            return "a TorchScript archive, which holds a program; to run an exported one, use `polyexport run`"
        if "archive_format" in files or "serialized_exported_program.json" in files:
            return "a torch.export program (.pt2); to run an exported one, use `polyexport run`"
        return ""
    made = {Path(each.artifact).suffix: each for each in known().values() if Path(each.artifact).suffix}
    if path.suffix == ".safetensors":
        return "in safetensors format; convert it: torch.save(safetensors.torch.load_file(path), 'weights.pt')"
    if each := made.get(path.suffix):
        return f"an artifact of {each.name}; to run an exported one, use `polyexport run`"
    with path.open("rb") as file:
        return "" if file.read(1) == b"\x80" else "neither a zip archive nor a pickle"


def record(path: Path, blob: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint's record in the report: its path, epoch, step, and the score that `ModelCheckpoint` gave it."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    at = {key: blob[key] for key in ("epoch", "global_step") if type(blob.get(key)) is int}
    with contextlib.suppress(Exception):  # a checkpoint that is not Lightning's may have anything under these names
        at |= _score(path, blob)
    return Checkpoint(path.absolute().as_posix(), sha256=sha256, **at)


def _score(path: Path, blob: Mapping[str, Any]) -> dict[str, Any]:
    """What was monitored, and the checkpoint's score, from the state of the first `ModelCheckpoint` that has one."""
    for state in blob.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor"):
            scores = {Path(kept).name: score for kept, score in state.get("best_k_models", {}).items()}
            score = scores.get(path.name, state.get("current_score"))
            if score is not None:
                return {"monitor": str(state["monitor"]), "score": float(score)}
    return {}


def model(path: Path, blob: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Make the module that `name` names and give it the checkpoint's weights.

    Args:
        path: The checkpoint's path, for messages.
        blob: A Lightning checkpoint, whose hyperparameters are the first keyword arguments, or a state dict.
        name: `package.module:Name` or `file.py:Name`, of a class or of a function that returns the module; the working
            folder is on the import path.
        arguments: Further keyword arguments, which override the hyperparameters.

    Raises:
        BadRequest: `name` cannot be imported or called, returns no module, or the weights do not fit it.
    """
    import torch

    make = _named(name)
    stored = blob.get("hyper_parameters") or {}
    if not isinstance(stored, Mapping) or not all(isinstance(key, str) for key in stored):
        raise BadRequest(f"the hyperparameters in {path} are no keyword arguments: {repr(stored)[:80]}")
    given = {**stored, **arguments}
    call = f"{name}({', '.join(given)})"
    try:
        made = make(**given)
    except (Exception, SystemExit) as error:  # the user's own constructor
        raise BadRequest(f"{call} failed: {line(error, 300)}") from None
    if not isinstance(made, torch.nn.Module):
        raise BadRequest(f"{name} returned a {type(made).__name__}, which is not a torch.nn.Module")
    try:
        made.load_state_dict(blob.get("state_dict", blob))
    except Exception as error:  # the weights do not fit
        raise BadRequest(f"{call} does not fit {path}: {line(error, 300)}") from None
    return made


def arguments(text: str) -> dict[str, Any]:
    """Keyword arguments from JSON.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{text[:80]!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest(f"{text[:80]!r} is not a JSON object of keyword arguments")
    return found


def inputs(path: Path) -> Arrays:
    """Named arrays of numbers or booleans from an `.npz`.

    Raises:
        BadRequest: there is no such file, or it is not an `.npz` of named arrays.
    """
    if not path.is_file():
        raise BadRequest(f"there is no file {path}; give an .npz of named arrays: np.savez('inputs.npz', NAME=array)")
    try:
        arrays = np.load(path)
        if isinstance(arrays, np.ndarray):
            raise BadRequest(
                f"{path} holds one array without a name; save it with one: np.savez('inputs.npz', NAME=array)"
            )
        with arrays:
            return {name: _of_numbers(path, name, arrays[name]) for name in arrays.files}
    except BadRequest:
        raise
    except Exception as error:  # numpy and zipfile raise many types for a file that is damaged or something else
        raise BadRequest(f"{path} is not an .npz of named arrays: {line(error, 300)}") from None


def _of_numbers(path: Path, name: str, array: Any) -> np.ndarray:
    """The array, in this machine's byte order, which PyTorch needs."""
    if not isinstance(array, np.ndarray):
        raise BadRequest(f"{path} is not an .npz of named arrays: it has a file {name!r}")
    if array.dtype.kind not in "biufc" or array.dtype.char in "gG":  # long doubles
        raise BadRequest(f"{name} in {path} is {array.dtype}; give an array of numbers or booleans")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        BadRequest: there is no such file, or it is not text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not text in UTF-8: {error}") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None


def metadata(texts: Sequence[str]) -> dict[str, str]:
    """Entries from `name=text`.

    Raises:
        BadRequest: an entry has another form.
    """
    if wrong := [text for text in texts if not text.partition("=")[0] or "=" not in text]:
        raise BadRequest(f"{wrong[0]!r} is not a metadata entry; write NAME=TEXT, such as license=MIT")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def step(name: str | None) -> Any:
    """A processing step by `package.module:Name` or `file.py:Name`; a class is called without arguments.

    Raises:
        BadRequest: it cannot be imported, or its class needs arguments.
    """
    if name is None:
        return None
    found = _named(name)
    try:
        return found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:  # the user's own constructor
        raise BadRequest(f"{name}() failed: {line(error, 300)}") from None


def dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Dynamic axes from `input:axis=name`: `["ids:0=batch", "ids:1=length"]`.

    Raises:
        BadRequest: an entry has another form.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+):(-?\d+)=(\w+)", text)
        if match is None:
            raise BadRequest(f"{text!r} is not a dynamic axis; write INPUT:AXIS=NAME, such as ids:1=length")
        name, axis, called = match.groups()
        found.setdefault(name, {})[int(axis)] = called
    return found


def _named(name: str) -> Any:
    home, colon, attribute = name.rpartition(":")
    if not (home and colon and attribute):
        raise BadRequest(f"{name!r} is neither package.module:Name nor file.py:Name")
    try:
        return getattr(_of_file(Path(home)) if home.endswith(".py") else _of_path(home), attribute)
    except SystemExit as error:
        guard = 'put what it does as a program below `if __name__ == "__main__":`'
        raise BadRequest(
            f"{name!r} cannot be imported, since {home} ends the program: {line(error)}; {guard}"
        ) from None
    except Exception as error:  # an import runs the user's code
        raise BadRequest(f"{name!r} cannot be imported: {line(error, 300)}") from None


def _of_path(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return import_module(module)


def _of_file(file: Path) -> Any:
    """Import a file, by its module name if that finds it, since workers import it too; else it is pickled by value."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    file = file.resolve()
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # for what it imports itself
    found = find_spec(file.stem) if file.stem.isidentifier() else None
    if found is not None and found.origin and Path(found.origin).resolve() == file:
        return import_module(file.stem)
    spec = spec_from_file_location(f"polyexport_model_{file.stem}", file)
    assert spec is not None, "the name ends with .py"
    assert spec.loader is not None, "the name ends with .py"
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
