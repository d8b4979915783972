"""What is decomposed while a module is traced answers as PyTorch's own functions do, and is what converters get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import polyexport
from polyexport.tracing import decompositions
from polyexport.tracing.sizes import sizes_followed

X, Y = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 126).reshape(3, 6, 7)
PLACES, BORDERS = X.argsort(1) % 2, torch.tensor([-1.0, 0.0, 0.5])
IDS, TABLE = torch.tensor([[1, 4, 4], [0, 8, 1], [2, 2, 2]]), torch.linspace(-1, 1, 36).reshape(9, 4)
HOLED = torch.where(X > 1, torch.nan, X)
GRID = torch.meshgrid(torch.linspace(-2, 2, 5), torch.linspace(-1, 1, 5), indexing="ij")
BAGS = torch.tensor([0, 3, 3, 9])


def bags(mode, *args, **more):
    return lambda: functional.embedding_bag(*args, mode=mode, **more)


def projection(**more):
    """The same layer at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.LSTM(7, 4, proj_size=3, batch_first=True, **more).eval().requires_grad_(False)


def bits_of(kind):
    """Bitwise operators and shifts of all integers of a type, from the least to the greatest."""
    dtype, width = getattr(torch, kind), torch.iinfo(getattr(torch, kind)).bits
    numbers = np.random.default_rng(0).bytes(8 * 126)
    x, y = torch.frombuffer(bytearray(numbers), dtype=dtype)[:126].reshape(2, 63)
    by = torch.arange(63).to(dtype) % (width - 1)
    changed = x.clone()
    changed &= 12
    return torch.stack(
        [
            *(x & y, x | y, x ^ y, ~x, x & -7, 90 & x, x | 5, x ^ 3, torch.bitwise_and(x, y), changed),
            *(x >> by, x << by, 3 << by, x >> 3, x << (width - 2)),
        ]
    )


CALLS = {
    "cdist": lambda: torch.cdist(X, Y),
    "cdist of many rows": lambda: torch.cdist(X.reshape(-1, 7), Y[0]),
    "cdist, absolute": lambda: torch.cdist(X, Y, p=1),
    "cdist, greatest": lambda: torch.cdist(X, Y, p=float("inf")),
    "cdist, cubic": lambda: torch.cdist(X, Y, 3.0),
    "fake quantization": lambda: torch.fake_quantize_per_tensor_affine(3 * X, 0.05, 3, -128, 127),
    "fake quantization by tensors": lambda: torch.fake_quantize_per_tensor_affine(
        3 * X, torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), 0, 15
    ),
    "fake quantization of channels": lambda: torch.fake_quantize_per_channel_affine(
        3 * X, torch.linspace(0.02, 0.1, 7), torch.arange(7, dtype=torch.int32), 2, -8, 7
    ),
    "eye": lambda: torch.eye(4),
    "eye of two sizes": lambda: torch.eye(4, 2, dtype=torch.int64),
    "diag_embed": lambda: torch.diag_embed(X),
    "diag_embed beside the diagonal": lambda: X.diag_embed(1),
    "scatter_reduce, sum": lambda: X.clone().scatter_reduce_(1, PLACES, X, "sum", include_self=False),
    "scatter_reduce, mean": lambda: torch.scatter_reduce(X, 1, PLACES, X, "mean"),
    "scatter_reduce, mean without itself": lambda: X.scatter_reduce(1, PLACES, X, "mean", include_self=False),
    "scatter_reduce, amax": lambda: X.scatter_reduce(1, PLACES, Y[:, :5], reduce="amax"),
    "scatter_reduce, amin without itself": lambda: X.scatter_reduce(1, PLACES, X, "amin", include_self=False),
    "unfold": lambda: X.unfold(1, 3, 2),
    "unfold of the last axis": lambda: X.unfold(-1, 2, 1),
    "bucketize": lambda: torch.bucketize(torch.cat([X.flatten(), BORDERS]), BORDERS),
    "bucketize, right": lambda: torch.bucketize(torch.cat([X.flatten(), BORDERS]), BORDERS, out_int32=True, right=True),
    "searchsorted": lambda: torch.searchsorted(X.sort(-1).values, X[..., :2].contiguous(), side="right"),
    "diagonal": lambda: X.diagonal(1, -2, -1),
    "diagonal below": lambda: torch.diagonal(X, -1, 2, 1),
    "cumprod": lambda: X.cumprod(1),
    "cummax": lambda: X.round().cummax(1).values + torch.cummax(X.round(), 1).indices,
    "cummin": lambda: X.round().cummin(-1).values + torch.cummin(X.round(), -1).indices,
    "cummax of integers": lambda: IDS.cummax(0).values,
    "masked_scatter": lambda: X.masked_scatter(X > 0, Y) + torch.masked_scatter(X, X[:, :1] > 0, Y),
    "masked_scatter in place": lambda: X.clone().masked_scatter_(X > 0, Y),
    "quantile": lambda: torch.quantile(X, 0.3, dim=1),
    "quantile, axis kept": lambda: X.quantile(0.5, 1, keepdim=True),
    "quantile of all": lambda: X.quantile(0.25),
    "median": lambda: X.median(1)[0],
    "median's place": lambda: torch.median(X, dim=-1, keepdim=True).indices,
    "median of all": lambda: X.median(),
    "xor": lambda: (X > 0) ^ (X < 1),
    "take_along_dim": lambda: torch.take_along_dim(X, PLACES[:, :1], 1) + X[:1].take_along_dim(PLACES, 1),
    "take_along_dim of all": lambda: X.take_along_dim(PLACES),
    "kthvalue": lambda: X.kthvalue(2, 1, keepdim=True).indices + torch.kthvalue(X, 3, dim=1, keepdim=True).values,
    "movedim": lambda: torch.movedim(X, (0, -1), (1, 0)),
    "topk": lambda: X.topk(2, 1, largest=False).values,
    "named arguments": lambda: torch.sum(input=X > 0, dim=1) + torch.topk(input=X, k=2, dim=1).indices.sum(1),
    "another way to call it": lambda: (
        torch.cumprod(X, dim=1, dtype=torch.float64) + X.sum(1, dtype=torch.float64)[:, None]
    ),
    "data": lambda: X.data.detach() + X.new_ones(7).data,
    "movedim of one": lambda: X.movedim(0, 2),
    "padded in circles": lambda: functional.pad(X, (2, 0, 1, 3), mode="circular"),
    "padded with a value": lambda: functional.pad(X, (2, 0, 1, 3), value=0.5),
    **{
        f"conv_transpose3d, {more} more": lambda more=more: functional.conv_transpose3d(
            X.reshape(1, 3, 1, 5, 7),
            torch.linspace(-1, 1, 324).reshape(3, 4, 3, 3, 3),
            stride=2,
            padding=(1, 0, 1),
            output_padding=(1, 0, more),
            bias=torch.ones(4),
        )
        for more in (0, 1)
    },
    "adaptive_avg_pool1d, uneven": lambda: nn.AdaptiveAvgPool1d(3)(X) + torch.adaptive_avg_pool1d(X, 3),
    "adaptive_avg_pool2d, uneven": lambda: nn.AdaptiveAvgPool2d((7, 4))(X) + functional.adaptive_avg_pool2d(X, [7, 4]),
    "adaptive_avg_pool2d, even": lambda: nn.AdaptiveAvgPool2d((None, 1))(X),
    "atan2": lambda: torch.atan2(GRID[0], GRID[1]) + GRID[1].arctan2(GRID[0]),
    "heaviside": lambda: torch.heaviside(GRID[0], torch.tensor(0.5)),
    "copysign": lambda: torch.copysign(GRID[0], GRID[1] + 0.5) + GRID[0].copysign(-2),
    "LSTM with a projection": lambda: projection()(X)[0] + projection(bidirectional=True, num_layers=2)(X)[1][0].sum(),
    "LSTM with a projection and states": lambda: projection(num_layers=2)(X[:, 0], (Y[0, :2, :3], Y[1, :2, :4]))[1][1],
    "fmax, fmin": lambda: torch.fmax(HOLED, X).fmin(torch.where(X > 1, torch.nan, X + 1)),
    "nansum": lambda: HOLED.nansum() + torch.nansum(HOLED, 1, keepdim=True),
    "nanmean": lambda: torch.nanmean(HOLED, dim=(0, 1)) + HOLED.nanmean(),
    "count_nonzero": lambda: torch.count_nonzero(X.round(), 1) + X.round().count_nonzero(),
    "any, all of numbers": lambda: X.round().any(1) ^ torch.all(IDS, dim=1, keepdim=True),
    "NaN among borders": lambda: torch.bucketize(HOLED, BORDERS) - torch.bucketize(HOLED, BORDERS, right=True),
    "hypot": lambda: torch.hypot(X, Y[:, :5]),
    "and, or": lambda: ((X > 0) & (X < 1)) | (X > 1.5),
    **{f"bits of {kind}": lambda kind=kind: bits_of(kind) for kind in ("uint8", "int8", "int16", "int32", "int64")},
    "mode": lambda: X.round().mode(1, keepdim=True).values + torch.mode(X.round(), -1, keepdim=True).indices,
    "mode of integers": lambda: IDS.mode().values,
    "argsort, stable": lambda: torch.argsort(IDS, dim=0, stable=True) + IDS.argsort(0, descending=True),
    "truth of NaN": lambda: (
        HOLED.bool() ^ torch.logical_not(HOLED) ^ HOLED.logical_and(IDS[0, 0]) ^ HOLED.to(torch.bool)
    ),
    "sizes that are tensors of int32": lambda: torch.cat(
        [
            torch.zeros(IDS.max().int(), 7),
            torch.full((IDS[0, 0].int(), 7), 2.0),
            X[0].new_ones(IDS[0, 1].int(), 7),
            X[0, 0].expand(IDS[2, 0].int(), 7),
            X.new_full([IDS[0, 1].int(), 7], 1.0),
            X.reshape(IDS[2, 0].short() + 13, 7),
        ]
    ),
    "one_hot": lambda: functional.one_hot(IDS, 12),
    "one_hot of as many classes as there are": lambda: functional.one_hot(IDS),
    "sum of booleans": lambda: (X > 0).sum(1, keepdim=True),
    **{f"bags, {m}": bags(m, IDS, TABLE) for m in ("sum", "mean", "max")},
    **{f"bags without the padding, {m}": bags(m, IDS, TABLE, padding_idx=2) for m in ("sum", "mean", "max")},
    **{f"bags by offsets, {m}": bags(m, IDS.flatten(), TABLE, BAGS[:3]) for m in ("sum", "mean", "max")},
    "bags by offsets, the last one too": bags("mean", IDS.flatten(), TABLE, BAGS, include_last_offset=True),
    "bags, weighted": bags("sum", IDS, TABLE, per_sample_weights=torch.rand(3, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_decomposed_function_answers_as_pytorch_does(name):
    torch.manual_seed(0)
    expected = CALLS[name]()
    with decompositions.decomposed():
        found = CALLS[name]()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


class Apart(nn.Module):
    """Compares each row with every other one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same = torch.eye(x.shape[0], dtype=torch.bool)
        return (x @ x.T).masked_fill(same, 0.0), torch.eye(x.shape[0], 3)


def test_means_of_uneven_parts_are_matrix_products():
    """Else they are lookups of six axes, which TensorFlow Lite cannot choose from."""
    with decompositions.decomposed():
        program = torch.export.export(nn.AdaptiveAvgPool2d((7, 4)), (torch.rand(2, 3, 2, 6),), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.matmul.default" in targets
    assert not any("pool" in target for target in targets)


def test_an_identity_of_a_dynamic_size_is_a_comparison_of_indices():
    rows = torch.randn(4, 5)
    with decompositions.decomposed():
        program = torch.export.export(Apart(), (rows,), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC}),))
    assert not [node for node in program.graph.nodes if "eye" in str(node.target)]
    for found, expected in zip(program.module()(rows[:3]), Apart()(rows[:3]), strict=True):
        torch.testing.assert_close(found, expected)


class Ruled(nn.Module):
    """Evenly spaced numbers, as many as there are rows, of which there may be one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, len(x)) + x[:, 0]


@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_evenly_spaced_numbers_of_a_dynamic_size_are_multiples_of_their_distance(tracer):
    rows = torch.randn(4, 5)
    with decompositions.decomposed(), sizes_followed(Ruled()):
        if tracer == "jit":
            made = torch.jit.trace(Ruled(), rows)
        else:
            made = torch.export.export(Ruled(), (rows,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for count in (1, 3, 4):
        torch.testing.assert_close(made(rows[:count]), Ruled()(rows[:count]))


class Counted(nn.Module):
    """How often each class occurs, up to the greatest."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.one_hot(ids).sum(0)


@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_the_number_of_classes_follows_the_data(tracer):
    first, other = torch.tensor([0, 2, 1]), torch.tensor([4, 1, 4])
    with decompositions.decomposed():
        if tracer == "jit":
            traced = torch.jit.trace(Counted(), first, check_trace=False)
        else:
            traced = torch.export.export(Counted(), (first,), strict=False).module()
    assert traced(first).tolist() == [1, 1, 1]
    assert traced(other).tolist() == [0, 1, 0, 0, 2]


class Decomposable(nn.Module):
    """Catches the error of a matrix that has no Cholesky factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return torch.linalg.cholesky(x)
        except Exception:
            return x


def test_an_error_that_forward_catches_ends_a_trace_with_a_reason_and_not_by_a_signal():
    told = r"linalg_cholesky raises at test_tracing.py:\d+ \(.*not positive-definite.*which ends a trace"
    with pytest.raises(RuntimeError, match=told), decompositions.decomposed():
        torch.jit.trace(Decomposable(), -torch.eye(3), check_trace=False)
    with decompositions.decomposed():
        assert torch.equal(Decomposable()(-torch.eye(3)), -torch.eye(3))
        torch.jit.trace(Decomposable(), torch.eye(3), check_trace=False)


class Padded(nn.Module):
    """What has PyTorch's fused path, what compares its mask with the causal one, and attention with a learnt bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(9, 8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.bias = nn.Parameter(torch.randn(4, 4, 2))  # as T5 and Swin keep it: the heads last

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        padding = ids == 0
        x = x + self.bags(ids).unsqueeze(1)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        bias = self.bias.permute(2, 0, 1).unsqueeze(0)
        x = functional.scaled_dot_product_attention(heads, heads, heads, bias).transpose(1, 2).reshape(x.shape)
        return self.transformer.encoder(self.transformer(x, x, tgt_mask=mask), src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_transformer_that_pads_is_exported_by_the_first_route_with_a_note_on_its_padding(tmp_path):
    inputs = (torch.randn(3, 4, 8), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]))
    report = polyexport.export(Padded().eval(), inputs, ["pt2", "torchscript", "onnx"], tmp_path / "e", bench=False)
    routes = [(each.state, each.route) for each in report.outcomes]
    assert routes == [("verified", "export"), ("verified", "trace"), ("verified", "dynamo")]
    (note,) = (note.text for note in report.notes)
    assert note.startswith("PyTorch's fused path for nn.TransformerEncoder returns other values (zeros) at masked")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_sizes_of_two_integer_types_do_not_meet_in_one_onnx_node(tmp_path):
    """As in chemprop's aggregations; ONNX Runtime loads no graph that joins int32 with int64."""
    import onnxruntime

    class Summed(nn.Module):
        def forward(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
            rows = group.unsqueeze(1).repeat(1, x.shape[1])
            return torch.zeros(group.max().int() + 1, x.shape[1]).scatter_add(0, rows, x)

    example = torch.ones(4, 3), torch.tensor([0, 1, 1, 2])
    with torch.no_grad(), decompositions.decomposed():
        torch.onnx.export(
            Summed(), example, str(tmp_path / "m.onnx"), dynamo=False, input_names=["x", "group"], opset_version=17
        )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"x": np.ones((4, 3), np.float32), "group": np.array([0, 4, 4, 4])})
    assert found.tolist() == [[1.0] * 3, *[[0.0] * 3] * 3, [3.0] * 3]
