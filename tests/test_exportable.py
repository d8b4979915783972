"""Options of model libraries are set while a module is traced, and only then."""

from __future__ import annotations

import math
from math import sqrt
from typing import Any

import pytest
import torch

from polyexport.tracing.decompositions import decomposed
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
        with exportable(model, dynamic=True):
            torch.testing.assert_close(model(tokens).last_hidden_state, expected)
            program = torch.export.export(model, (tokens,), strict=False)
    assert not any("grouped_mm" in str(node.target) for node in program.graph.nodes)
    assert model.config._experts_implementation == before == "grouped_mm"


def test_a_longformer_cuts_its_chunks_without_strides() -> None:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=8, num_attention_heads=2, attention_window=[4], num_hidden_layers=1)
    attention = LongformerSelfAttention(config, 0).eval()
    with torch.no_grad(), exportable(attention, dynamic=True):
        chunks = attention._chunk(torch.rand(2, 8, 4), 2, attention.config.onnx_export)
    assert chunks.shape == (2, 3, 4, 4)
    assert config.onnx_export is False


def test_a_module_without_a_config_is_unchanged() -> None:
    model = torch.nn.Linear(2, 2)
    with exportable(model, dynamic=True) as found:
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


def test_the_result_of_len_stays_dynamic_in_a_trace() -> None:
    model, two, five = AsksForLengths().eval(), torch.rand(2, 2, 2), torch.rand(5, 2, 2)
    expected = model(five)
    with torch.no_grad(), exportable(model, dynamic=True):
        traced = torch.jit.trace(model, (two,), check_trace=False)
        program = export_program(model, (two,), [(0,)])
    torch.testing.assert_close(traced(five), expected)
    torch.testing.assert_close(program.module()(five), expected)
    assert "len" not in globals()


class SizesAsNumbers(torch.nn.Module):
    """Makes Python numbers of sizes by `how`."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.head = how, torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self.head(x))


SIZES = {
    "int": lambda x: x.view(int(x.shape[0]), 2, -1),
    "int of each": lambda x: torch.zeros(tuple(map(int, x.shape))) + x.reshape([int(size) for size in x.size()]),
    "int of a quotient": lambda x: x[: int(x.shape[0] / 2 + 1)],
    "float": lambda x: x / float(x.shape[0]),
    "float of a sum": lambda x: x.sum(0) / (float(x.size(0)) + 1),
    "a root": lambda x: x / math.sqrt(x.shape[0]),
    "a function": lambda x: x * sqrt(int(x.size(0))),
    "len": lambda x: x / len(x),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_converted_to_a_python_number_stays_dynamic_in_a_trace(name) -> None:
    model, four, nine = SizesAsNumbers(SIZES[name]).eval(), torch.rand(4, 4), torch.rand(9, 4)
    expected = model(nine)
    with torch.no_grad(), exportable(model, dynamic=True):
        traced = torch.jit.trace(model, (four,), check_trace=False)
        program = export_program(model, (four,), [(0,)])
    torch.testing.assert_close(traced(nine), expected)
    torch.testing.assert_close(program.module()(nine), expected)


NUMBERS = (
    "isinstance(3, int) and not isinstance(3.0, int) and isinstance(0.5, float) and issubclass(bool, int)",
    "type(3) == int and {int: 1, float: 2}[type(0.5)] == 2",
    "int('7', base=8) == 7 and int() == 0 and int(2.5) == 2 and float('inf') == math.inf",
    "int.from_bytes(b'1', 'big') == 49 and float.fromhex('0x1') == 1",
    "len('ab') == 2 and math.ceil(0.5) == 1 and sqrt(4) == math.sqrt(4) == 2",
)


def uses_numbers(x: torch.Tensor) -> torch.Tensor:
    assert [each for each in NUMBERS if not eval(each)] == []
    return x * int(2.5) * float(3)


def test_a_number_that_is_not_a_size_stays_a_number() -> None:
    model, x = SizesAsNumbers(uses_numbers).eval(), torch.rand(4, 4)
    expected, before = model(x), dict(globals())
    with torch.no_grad(), exportable(model, dynamic=True):
        assert "int" in globals()
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), expected)
    assert globals() == before


def test_a_number_read_from_data_is_not_a_size() -> None:
    model = SizesAsNumbers(lambda x: x * [0.5, 2.0][int(x.sum() * 0)] * {0: 3.0}[int(x.shape[0] * x[0, 0] * 0)]).eval()
    x = torch.rand(4, 4)
    with (
        torch.no_grad(),
        exportable(model, dynamic=True),
        pytest.warns(torch.jit.TracerWarning, match="Python integer"),
    ):
        torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), model(x))


def test_a_size_read_from_data_is_dynamic_in_a_program() -> None:
    """As in `int(batch.max()) + 1`, the number of graphs in a batch."""
    model = SizesAsNumbers(lambda x: torch.zeros(int(x.abs().max() * 0) + x.shape[0], 4) + x).eval()
    counts = SizesAsNumbers(lambda x: torch.ones(int(x.argmax(1).max()) + 1, 2)).eval()
    four, nine = torch.rand(4, 4), torch.rand(9, 4)
    with torch.no_grad(), exportable(model, dynamic=True):
        program = export_program(counts, (four,), [(0,)])
        torch.testing.assert_close(program.module()(nine), counts(nine))


def test_names_that_torch_jit_script_will_read_are_left_alone() -> None:
    apart = {"torch": torch, "scripted": torch.jit.script_if_tracing(lambda x: x * int(x.shape[0] / 2))}
    exec("class Apart(torch.nn.Module):\n    def forward(self, x):\n        return scripted(x)", apart)
    with exportable(apart["Apart"](), dynamic=True):
        assert "int" not in apart


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
    with torch.no_grad(), exportable(model, dynamic=True):
        program = export_program(model, (two,), [(0,)])
    torch.testing.assert_close(program.module()(five), model(five))
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(0.0, torch.tensor(-1.0))


class Neighbors(torch.nn.Module):
    """Sums over the neighbors in a graph, given as a sparse buffer and as a sparse attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).roll(1, 0).to_sparse())
        self.two_steps = torch.eye(4).roll(2, 0).to_sparse_csr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = torch.sparse.mm(self.adjacency.coalesce(), x)
        return once + self.two_steps @ x + self.adjacency.to_dense() @ x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_sparse_tensors_of_a_module_are_dense_in_a_trace(tracer) -> None:
    model, x = Neighbors(), torch.rand(4, 3)
    expected = model(x)
    with torch.no_grad(), decomposed(), exportable(model, dynamic=False):
        traced: Any = torch.jit.trace(model, x) if tracer == "jit" else export_program(model, (x,), [()]).module()
    torch.testing.assert_close(traced(x), expected)
    assert "parse" not in str(traced.graph)
    assert model.adjacency.is_sparse
    assert model.two_steps.layout is torch.sparse_csr
