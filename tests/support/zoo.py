"""Models as different as users' are: small, random weights, each with real-looking inputs.

Every entry is a function that returns a module and the inputs of its forward: a tensor, a tuple of positional arguments
or a dict of keyword arguments, as `polyexport.export` takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

BATCH = 4

Entry = Callable[[], tuple[nn.Module, Any]]


class TwoInputs(nn.Module):
    """Token ids and their mask, by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.float() / mask.float().sum(-1, keepdim=True)
        return self.head((self.embedding(ids) * weights.unsqueeze(-1)).sum(1))


class Keywords(nn.Module):
    """Keyword arguments, one of them no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(self, *, left: torch.Tensor, right: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.left(left) * gain + self.right(right))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = functional.relu(self.body(image)).flatten(2).transpose(1, 2)
        return {"boxes": self.boxes(found).sigmoid(), "scores": self.scores(found).softmax(-1)}


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.variance = nn.Linear(10, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden = functional.gelu(self.encoder(x))
        return hidden, (self.mean(hidden), functional.softplus(self.variance(hidden)))


class IntegerOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12, 7))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.net(signal).argmax(-1)


class Recurrent(nn.Module):
    """A bidirectional LSTM or GRU over a sequence."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 4)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(sequence)[0][:, -1])


class ConvolutionalSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(3, 16, 5, padding=4, dilation=2),
            nn.BatchNorm1d(16),
            nn.SiLU(),
            nn.AvgPool1d(2),
            nn.Conv1d(16, 16, 3, groups=4),
            nn.GroupNorm(4, 16),
            nn.ELU(),
            nn.AdaptiveMaxPool1d(1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(signal).squeeze(-1))


class UNet(nn.Module):
    """Transposed convolution, bilinear upsampling, skip connections, GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(3, 8), self.block(8, 16)
        self.middle = self.block(16, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.join2, self.join1 = self.block(32, 8), self.block(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.LeakyReLU(0.1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        one = self.down1(image)
        two = self.down2(functional.max_pool2d(one, 2))
        middle = self.middle(functional.max_pool2d(two, 2))
        joined = self.join2(torch.cat([self.up(middle), two], 1))
        larger = functional.interpolate(joined, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.join1(torch.cat([larger, one], 1)))


class Autoencoder(nn.Module):
    """A variational autoencoder, which samples in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh())
        self.mean, self.deviation = nn.Linear(32, 4), nn.Linear(32, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(image)
        mean, deviation = self.mean(hidden), self.deviation(hidden)
        latent = mean + torch.randn_like(mean) * deviation.exp() if self.training else mean
        return {"image": self.decoder(latent).sigmoid(), "mean": mean, "deviation": deviation}


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(BATCH, channels, size, size)


def tokens(vocabulary: int = 100, length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(0, vocabulary, (BATCH, length)), "attention_mask": mask}


def vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config), {"pixel_values": images()}


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForSequenceClassification(config), tokens()


def segformer() -> tuple[nn.Module, Any]:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        decoder_hidden_size=16,
        num_labels=5,
        num_attention_heads=[1, 2, 3, 4],
    )
    return SegformerForSemanticSegmentation(config), {"pixel_values": images(size=64)}


def resnet() -> tuple[nn.Module, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    return ResNetForImageClassification(config), {"pixel_values": images(size=64)}


def gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    return GPT2LMHeadModel(config), tokens()


def convnext() -> tuple[nn.Module, Any]:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return ConvNextForImageClassification(config), {"pixel_values": images(size=64)}


GROUND: dict[str, Entry] = {
    "two_inputs": lambda: (TwoInputs(), (torch.randint(0, 50, (BATCH, 9)), torch.ones(BATCH, 9, dtype=torch.bool))),
    "keywords": lambda: (Keywords(), {"left": torch.randn(BATCH, 6), "right": torch.randn(BATCH, 3), "gain": 0.5}),
    "dict_output": lambda: (DictOutput(), images()),
    "tuple_output": lambda: (TupleOutput(), torch.randn(BATCH, 10)),
    "integer_output": lambda: (IntegerOutput(), torch.randn(BATCH, 2, 16)),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(BATCH, 10, 8)),
    "vit": vit,
    "bert": bert,
    "segformer": segformer,
    "resnet": resnet,
}
"""The ten that every format must carry."""

FURTHER: dict[str, Entry] = {
    "unet": lambda: (UNet(), images()),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(BATCH, 10, 8)),
    "conv1d": lambda: (ConvolutionalSequence(), torch.randn(BATCH, 3, 40)),
    "gpt2": gpt2,
    "convnext": convnext,
    "vae": lambda: (Autoencoder(), torch.rand(BATCH, 1, 8, 8)),
}
"""Six more, with what the ten lack."""


FORMATS = ("torchscript", "pt2", "onnx", "openvino", "coreml")
"""What every model is exported to once a session; see `exported`."""


def build(name: str) -> tuple[nn.Module, Any]:
    """The model and its inputs, the same at every call."""
    torch.manual_seed(0)
    return (GROUND | FURTHER)[name]()
