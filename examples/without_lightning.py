"""The engine alone: export any PyTorch module, verified and timed, and load an artifact back.

python examples/without_lightning.py
"""

import torch
from torch import nn

import polyexport
from polyexport.report.console import show


class Attention(nn.Module):
    """One self-attention block over token ids, with a padding mask."""

    def __init__(self, vocabulary: int = 200, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return {"logits": self.head(x.mean(1))}


def main() -> None:
    ids = torch.randint(0, 200, (8, 16))
    padding = torch.zeros(8, 16, dtype=torch.bool)
    padding[3, 10:] = True
    report = polyexport.export(Attention(), (ids, padding), ["onnx", "openvino"], into="runs/attention", progress=print)
    show(report)

    run = polyexport.load("runs/attention/onnx")
    print(run({"ids": ids.numpy(), "padding": padding.numpy()})["logits"][0])


if __name__ == "__main__":
    main()
