"""A checkpoint on disk to a module and its inputs, for whoever exports without the process that trained it."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from polyexport.errors import BadRequest
from polyexport.spec import Arrays

if TYPE_CHECKING:
    import torch


def model(path: Path, name: str, arguments: Mapping[str, Any], *, trust: bool = False) -> torch.nn.Module:
    """Make the module that `name` names and give it the checkpoint's weights.

    Args:
        path: A Lightning checkpoint, whose hyperparameters are the first keyword arguments, or a state dict.
        name: `package.module:Name` of a class, or of a function that returns the module; the working folder counts.
        arguments: Further keyword arguments; they win over the hyperparameters.
        trust: Whether the checkpoint's pickles may run code.

    Raises:
        BadRequest: the checkpoint cannot be read, or does not fit.
    """
    import torch

    if not path.is_file():
        raise BadRequest(f"there is no checkpoint {path}")
    try:
        blob = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise BadRequest(f"{path} cannot be read: {_line(error)}") from None
        raise BadRequest(f"{path} holds more than tensors; if you trust who made it, give --trust") from None
    except Exception as error:  # torch says what it pleases of a file that is no checkpoint
        raise BadRequest(f"{path} cannot be read: {_line(error)}") from None
    if not isinstance(blob, Mapping):
        raise BadRequest(f"{path} holds a {type(blob).__name__}, neither a checkpoint nor a state dict")
    make = _named(name)
    given = {**blob.get("hyper_parameters", {}), **arguments}
    try:
        made = make(**given)
        if isinstance(made, torch.nn.Module):
            made.load_state_dict(blob.get("state_dict", blob))
            return made
    except Exception as error:  # the user's own constructor; or weights that do not fit
        raise BadRequest(f"{name}({', '.join(given)}) does not fit {path}: {_line(error)}") from None
    raise BadRequest(f"{name} made a {type(made).__name__}, which is no torch.nn.Module")


def arguments(text: str) -> dict[str, Any]:
    """Keyword arguments from JSON.

    Raises:
        BadRequest: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest(f"{text!r} is no JSON object of keyword arguments")
    return found


def inputs(path: Path) -> Arrays:
    """Named arrays from an `.npz`.

    Raises:
        BadRequest: there is none.
    """
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, BadZipFile) as error:
        raise BadRequest(f"{path} is no .npz of named arrays: {_line(error)}") from None


def _named(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise BadRequest(f"{name!r} is no package.module:Name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"{name!r} cannot be imported: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
