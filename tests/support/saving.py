"""A module in a folder, as a worker gets it."""

from __future__ import annotations

import torch

from polyexport.capture import snapshot
from polyexport.capture.calls import save_call


def saved(root, folder, *args, select=None, **kwargs):
    folder.mkdir(exist_ok=True)
    snapshot.save_structure(root, select, folder)
    save_call(args, kwargs, folder)
    torch.save(root.state_dict(), folder / "weights.pt")
    return folder
