"""Each new best checkpoint in every deployment format asked for, proven, measured, published."""

from lightning_export.callback import ExportCallback
from polyexport.publish.bom import BillOfMaterials
from polyexport.publish.huggingface import HuggingFace
from polyexport.publish.signed import Signed
from polyexport.publish.triton import TritonRepository
from polyexport.publish.wandb import Wandb

__all__ = ["BillOfMaterials", "ExportCallback", "HuggingFace", "Signed", "TritonRepository", "Wandb"]
