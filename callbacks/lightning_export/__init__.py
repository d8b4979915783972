"""Exports each new best checkpoint to every deployment format asked for: verified, measured, and published."""

from lightning_export.callback import ExportCallback
from polyexport.publish.bom import BillOfMaterials
from polyexport.publish.huggingface import HuggingFace
from polyexport.publish.signed import Signed
from polyexport.publish.triton import TritonRepository
from polyexport.publish.wandb import Wandb

__all__ = ["BillOfMaterials", "ExportCallback", "HuggingFace", "Signed", "TritonRepository", "Wandb"]
