"""Switches of model libraries are set for a trace, and for nothing else."""

from __future__ import annotations

import pytest
import torch

from polyexport.tracing.exportable import exportable
from polyexport.tracing.exported_program import export_program


def mixture() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralModel(MixtralConfig(**sizes, **heads, use_cache=False)).eval()


def test_a_mixture_of_experts_is_traced_by_operators_that_exporters_have() -> None:
    torch.manual_seed(0)
    model, tokens = mixture(), torch.randint(0, 30, (2, 5))
    before = model.config._experts_implementation
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        with exportable(model):
            torch.testing.assert_close(model(tokens).last_hidden_state, expected)
            program = torch.export.export(model, (tokens,), strict=False)
    assert not any("grouped_mm" in str(node.target) for node in program.graph.nodes)
    assert model.config._experts_implementation == before == "grouped_mm"


def test_a_longformer_cuts_its_chunks_without_strides() -> None:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=8, num_attention_heads=2, attention_window=[4], num_hidden_layers=1)
    attention = LongformerSelfAttention(config, 0).eval()
    with torch.no_grad(), exportable(attention):
        chunks = attention._chunk(torch.rand(2, 8, 4), 2, attention.config.onnx_export)
    assert chunks.shape == (2, 3, 4, 4)
    assert config.onnx_export is False


def test_a_module_without_a_config_is_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    with exportable(model) as found:
        assert found is model


def flattened(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1)


class AsksForLengths(torch.nn.Module):
    """Of its input, in a function beside it, of a list, and of a weight to go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.rand(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [flattened(x) * self.weights[index] for index in range(len(self.weights))]
        return sum(parts).reshape(len(x), 2, -1) / len(parts) + torch.zeros([len(x), *[1] * len(x.shape)])


def test_a_size_asked_for_by_len_is_followed_by_a_trace() -> None:
    model, two, five = AsksForLengths().eval(), torch.rand(2, 2, 2), torch.rand(5, 2, 2)
    expected = model(five)
    with torch.no_grad(), exportable(model):
        traced = torch.jit.trace(model, (two,), check_trace=False)
        program = export_program(model, (two,), [(0,)])
    torch.testing.assert_close(traced(five), expected)
    torch.testing.assert_close(program.module()(five), expected)
    assert "len" not in globals()


def test_a_distribution_in_forward_is_exported_without_the_checks_of_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Latent(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Normal(x, x.exp()).log_prob(torch.zeros_like(x))

    model, two, five = Latent().eval(), torch.rand(2, 3), torch.rand(5, 3)
    monkeypatch.setattr(
        torch.distributions.Distribution, "_validate_args", True
    )  # torch.compile switches it off for good
    with torch.no_grad(), exportable(model):
        program = export_program(model, (two,), [(0,)])
    torch.testing.assert_close(program.module()(five), model(five))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(0.0, torch.tensor(-1.0))
