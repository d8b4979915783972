"""Two processes train one model with DDP, and only rank zero exports it.

python examples/ddp.py

Lightning starts the second process. When `fit` ends, the other ranks wait for the export outside of any collective, so
nothing times out, however long a conversion takes. It prints one line per export, then the table, then what each rank
has exported.
"""

from digits import Digits, loaders
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_export import ExportCallback


def main() -> None:
    seed_everything(1)
    export = ExportCallback(["onnx"], bench=False)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        default_root_dir="runs/ddp",
        callbacks=[ModelCheckpoint(monitor="val_loss"), export],
        enable_model_summary=False,
    )
    trainer.fit(Digits(), *loaders())
    print(f"rank {trainer.global_rank}: {len(export.reports)} exports")


if __name__ == "__main__":
    main()
