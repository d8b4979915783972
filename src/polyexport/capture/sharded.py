"""Joins sharded checkpoints: from a folder that several ranks wrote to one file.

Requirements:
* Only workers read shards, since joining needs memory for the whole model.
* Each kind is joined by its own tool: PyTorch's for FSDP and tensor parallelism, DeepSpeed's for ZeRO.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from polyexport.capture.weights import read_checkpoint
from polyexport.errors import BadRequest, ToolMissing
from polyexport.serialization import writing


def join(shards: Path, target: Path) -> None:
    """Write the weights in the folder `shards`, with epoch and step if known, to the file `target`.

    Raises:
        BadRequest: the folder was written by neither of them.
        ToolMissing: DeepSpeed wrote it, and is not installed here.
    """
    import torch

    if (shards / ".metadata").exists():
        joined = _by_pytorch(shards, target.with_suffix(".joined"))
    elif (shards / "latest").exists() or (shards / "zero_to_fp32.py").exists():
        joined = {"state_dict": _by_deepspeed(shards)}
    else:
        held = ", ".join(sorted(path.name for path in shards.iterdir())[:5]) or "no files"
        raise BadRequest(
            f"the checkpoint is a folder with {held}; supported are those of torch.distributed.checkpoint (FSDP, "
            "tensor parallelism) and of DeepSpeed; join it yourself and give the file to `polyexport export`"
        )
    with writing(target) as file:
        torch.save(joined, file)


def _by_pytorch(shards: Path, whole: Path) -> dict[str, Any]:
    """Join FSDP's layout in Lightning (weights under `model`) or ModelParallelStrategy's (under `state_dict`)."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(shards, whole)
    found = read_checkpoint(whole)
    joined = {"state_dict": found.get("state_dict", found.get("model", found))}
    if (shards / "meta.pt").exists():  # what Lightning saves besides the weights
        about = read_checkpoint(shards / "meta.pt")
        joined |= {key: about[key] for key in ("epoch", "global_step") if key in about}
    whole.unlink()
    return joined


def _by_deepspeed(shards: Path) -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        raise ToolMissing(
            "the checkpoint is sharded by DeepSpeed, and deepspeed, which joins it, is not installed; "
            "install it (`pip install deepspeed`) and run `polyexport export` on the checkpoint"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(shards))
    return {name.removeprefix("_forward_module."): tensor for name, tensor in found.items()}
