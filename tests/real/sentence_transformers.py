"""sentence-transformers: an encoder with mean pooling, trained as a module of a LightningModule."""

from __future__ import annotations

import torch

from real.training import VERIFIED, Task, fit, loader, main

REQUIREMENTS = ("sentence-transformers",)
STATES = VERIFIED


def train(callback):
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import BertConfig, BertModel

    class Sentences(Task):
        def __init__(self):
            super().__init__(
                BertModel(
                    BertConfig(
                        vocab_size=100,
                        hidden_size=32,
                        num_hidden_layers=2,
                        num_attention_heads=4,
                        intermediate_size=64,
                    )
                )
            )
            self.pooling, self.normalize = Pooling(32), Normalize()

        def forward(self, input_ids, attention_mask):
            tokens = self.network(input_ids, attention_mask).last_hidden_state
            pooled = self.pooling({"token_embeddings": tokens, "attention_mask": attention_mask})
            return self.normalize(pooled)["sentence_embedding"]

        def answer(self, batch):
            return self(batch["input_ids"], batch["attention_mask"])

    rows = [
        {"input_ids": torch.randint(0, 100, (12,)), "attention_mask": (torch.arange(12) < size).long()}
        for size in range(1, 13)
    ]
    fit(Sentences(), loader(rows), callback)


if __name__ == "__main__":
    main(train)
