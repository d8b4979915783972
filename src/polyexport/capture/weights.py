"""State dicts in files, bare or in the checkpoint of a trainer."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from polyexport.capture import unwrap

if TYPE_CHECKING:
    from torch import nn

WEIGHTS, SHARDS = "weights.pt", "weights.shards"
"""Names in a module's folder of the weights: a file, or until a worker has joined them a folder of shards."""

LACKING = "lacking.pt"
"""File with the training module's weights that the checkpoint lacks: a state dict, if there are any."""


def load_weights(path: Path) -> dict[str, Any]:
    """Read a state dict, bare or inside a checkpoint."""
    blob = read_checkpoint(path)
    return {unwrap.clean_name(name): tensor for name, tensor in blob.get("state_dict", blob).items()}


def versioned(state: Mapping[str, Any], root: nn.Module) -> OrderedDict[str, Any]:
    """The state dict with the version of each module, as `root.state_dict()` has it; some modules refuse it without."""
    found: Any = OrderedDict(state)
    found._metadata = {name: {"version": getattr(each, "_version", 1)} for name, each in root.named_modules()}
    return found  # type: ignore[no-any-return]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `torch.save` wrote, without letting the file run code where that is possible."""
    import torch

    try:
        # what PyTorch wrote before 1.6, as some still ask for, cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        print(f"{path.name} has more than tensors, but was written by this run, so it is unpickled: {error}")
        found = torch.load(path, map_location="cpu", weights_only=False)
    return dict(found)
