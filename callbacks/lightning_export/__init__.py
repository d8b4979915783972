"""Each new best checkpoint in every deployment format asked for, proven, measured, published."""

from lightning_export.callback import ExportCallback
from polyexport.publish.triton import TritonRepository
from polyexport.publish.wandb import Wandb

__all__ = ["ExportCallback", "TritonRepository", "Wandb"]
