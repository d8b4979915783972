"""Train a tiny BERT, which takes token ids and their mask, and export each new best checkpoint during `fit`.

pip install transformers
python examples/transformer.py

It learns whether most words of a sentence are from the upper half of the vocabulary. It prints a line for each finished
format, then the table of the best checkpoint, then what its ONNX file returns for a sentence of another length: number
and length of sentences are both dynamic.
"""

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import polyexport
from lightning_export import ExportCallback

WORDS, LENGTH = 100, 12
AXES = {0: "sentences", 1: "words"}


class Majority(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=32, **size))

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.bert(ids, attention_mask).logits}

    def training_step(self, batch, batch_idx):
        ids, mask, upper = batch
        return functional.cross_entropy(self(ids, attention_mask=mask)["logits"], upper)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sentences(count: int) -> DataLoader:
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1))).long()
    ids = torch.randint(1, WORDS, (count, LENGTH)) * mask
    upper = (ids >= WORDS // 2).sum(1) * 2 > mask.sum(1)
    return DataLoader(TensorDataset(ids, mask, upper.long()), batch_size=64)


def main() -> None:
    seed_everything(1)
    export = ExportCallback(["onnx", "openvino"], dynamic={"ids": AXES, "attention_mask": AXES}, bench=False)
    callbacks = [ModelCheckpoint(monitor="val_loss"), export]
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, default_root_dir="runs/transformer", callbacks=callbacks
    )
    trainer.fit(Majority(), sentences(4096), sentences(512))

    run = polyexport.load(export.reports[-1].folder / "onnx")
    ids = np.array([[80, 90, 70, 3, 60]])
    logits = run({"ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    print(f"{ids[0].tolist()}: {'upper' if logits.argmax() else 'lower'} half")


if __name__ == "__main__":
    main()
