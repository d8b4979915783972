"""lightning_export: each new best checkpoint in every deployment format asked for, proven, measured, published."""

from lightning_export.callback import ExportCallback as ExportCallback
from polyexport.sinks.wandb import Wandb as Wandb
