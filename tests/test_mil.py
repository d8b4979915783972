"""The MIL evaluator against PyTorch: each function is converted, saved, read back and evaluated."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from polyexport.coreml.ops import OPS
from polyexport.errors import CannotRun
from polyexport.formats import coreml
from polyexport.measure.parity import compare
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import ExportSpec, TensorSpec

pytest.importorskip("coremltools", reason="coremltools is not installed; `pip install coremltools`")

IMAGE, SIGNAL, ROWS = (2, 4, 9, 10), (2, 4, 12), (3, 8)
PLACES = torch.tensor([2, 0, 2])


class Whole(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class First(nn.Module):
    """A layer's first output."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


class Repeated(nn.Module):
    """A recurrent cell, twice."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x, self.cell(x, x))


def resized(**how):
    return functools.partial(functional.interpolate, **how)


def trained(layer):
    layer.running_mean.uniform_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def sloped(channels):
    layer = nn.PReLU(channels)
    layer.weight.data.uniform_(-0.5, 0.5)
    return layer


def turned(x, *, align_corners):
    grid = functional.affine_grid(x.mean((1, 2))[:, :6].reshape(-1, 2, 3), x.shape, align_corners=align_corners)
    return functional.grid_sample(x, grid, align_corners=align_corners)


def tuple_of(*layers):
    return lambda x: tuple(layer(x) for layer in layers)


EDGES = ((3, 2), (3, 2, 1), ((2, 5), (2, 3), (1, 2)), (2, 3), (1, 2))
"""Kernel, stride and padding of pools whose last window hangs over; the last two have some that lie beyond."""

INTEGER_DIVISIONS = (
    functools.partial(torch.div, rounding_mode="floor"),
    functools.partial(torch.div, rounding_mode="trunc"),
    torch.floor_divide,
    torch.fmod,
    torch.remainder,
    torch.div,
)

FUNCTIONS = {
    "abs": (torch.abs, ROWS),
    "acos": (lambda x: torch.acos(x.clamp(-0.9, 0.9)), ROWS),
    "atan": (torch.atan, ROWS),
    "ceil, floor, round": (lambda x: (x * 3).ceil() + (x * 5).floor() * (x * 7).round(), ROWS),
    "clamp": (lambda x: x.clamp(-0.5, 0.7), ROWS),
    "erf": (torch.erf, ROWS),
    "exp, log": (lambda x: torch.log(torch.exp(x) + 1), ROWS),
    "reciprocal of little": (lambda x: 1 / (x.abs() * 0.01 + 0.01), ROWS),
    "rsqrt": (lambda x: torch.rsqrt(x.abs() + 0.1), ROWS),
    "reciprocal": (lambda x: torch.reciprocal(x.abs() + 1), ROWS),
    "pow": (lambda x: x.abs() ** 1.7, ROWS),
    "sin, cos, tan, sinh, cosh": (lambda x: x.sin() + x.cos() + x.tan() + x.sinh() + x.cosh(), ROWS),
    "remainder": (lambda x: torch.remainder(x, 0.3), ROWS),
    "floor_divide": (lambda x: torch.floor_divide(x, 0.3), ROWS),
    "where": (lambda x: torch.where((x > 0) & ~(x > 1), x, -x), ROWS),
    "minimum, maximum": (lambda x: torch.minimum(x, x.flip(0)) + torch.maximum(x, x.flip(1)), ROWS),
    "mean, sum, prod": (lambda x: x.mean(1) + x.sum(1) + x.prod(1), ROWS),
    "amax, amin": (lambda x: x.amax(0) - x.amin(0), ROWS),
    "norm": (lambda x: x.norm(dim=1), ROWS),
    "logsumexp": (lambda x: x.logsumexp(1), ROWS),
    "var": (lambda x: x.var(1), ROWS),
    "argmax": (lambda x: x.argmax(1), ROWS),
    "argmin, kept": (lambda x: x.argmin(0, keepdim=True), ROWS),
    "argsort": (lambda x: x.argsort(1), ROWS),
    "topk": (lambda x: x.topk(3, 1), ROWS),
    "the least three": (lambda x: x.topk(3, 1, largest=False).values, ROWS),
    "sort": (lambda x: x.sort(1, descending=True).values, ROWS),
    "cumsum": (lambda x: x.cumsum(1), ROWS),
    "softmax": (lambda x: x.softmax(0), ROWS),
    "log_softmax": (lambda x: x.log_softmax(1), ROWS),
    "gelu": (functional.gelu, ROWS),
    "gelu, tanh": (lambda x: functional.gelu(x, approximate="tanh"), ROWS),
    "elu": (functional.elu, ROWS),
    "leaky_relu": (functional.leaky_relu, ROWS),
    "prelu": (sloped(4), IMAGE),
    "conv and a fixed instance norm": (
        nn.Sequential(nn.Conv1d(4, 4, 3), trained(nn.InstanceNorm1d(4, track_running_stats=True)).eval()),
        SIGNAL,
    ),
    "conv and a fixed batch norm without scale": (
        nn.Sequential(nn.Conv1d(4, 4, 3), trained(nn.BatchNorm1d(4, affine=False)).eval()),
        SIGNAL,
    ),
    "prelu of rows": (sloped(8), ROWS),
    "prelu of signals": (sloped(4), SIGNAL),
    "prelu of one slope": (nn.PReLU(), SIGNAL),
    "silu": (functional.silu, ROWS),
    "mish": (functional.mish, ROWS),
    "relu6": (lambda x: functional.relu6(x * 5), ROWS),
    "hardswish": (functional.hardswish, ROWS),
    "hardsigmoid": (functional.hardsigmoid, ROWS),
    "softplus": (functional.softplus, ROWS),
    "softsign": (functional.softsign, ROWS),
    "glu": (functional.glu, ROWS),
    "matmul": (lambda x: x @ x.transpose(-1, -2), IMAGE),
    "einsum": (lambda x: torch.einsum("bchw,bcvw->bchv", x, x), IMAGE),
    "bilinear form": (lambda x: torch.einsum("bi,bj->bij", x, x), ROWS),
    "linear": (nn.Linear(8, 5), ROWS),
    "linear without bias": (nn.Linear(8, 5, bias=False), ROWS),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), IMAGE),
    "multihead attention": (First(nn.MultiheadAttention(8, 2, batch_first=True), 3), (2, 5, 8)),
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1), SIGNAL),
    "conv2d": (nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2), IMAGE),
    "conv2d, same": (nn.Conv2d(4, 6, 4, padding="same"), IMAGE),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, 2), SIGNAL),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2), IMAGE),
    "conv_transpose2d with room": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), IMAGE),
    "max_pool2d": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max_pool2d and its places": (nn.MaxPool2d(3, 2, return_indices=True), IMAGE),
    "max_pool2d with padding and its places": (nn.MaxPool2d(3, 2, 1, return_indices=True, ceil_mode=True), IMAGE),
    "max_pool2d of dilated windows and its places": (nn.MaxPool2d(2, 1, 1, dilation=2, return_indices=True), IMAGE),
    "max_pool2d of dilated windows": (nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), IMAGE),
    "max_pool1d and its places": (nn.MaxPool1d(3, 2, 1, return_indices=True), SIGNAL),
    "max_pool3d and its places": (nn.MaxPool3d(2, return_indices=True), (1, 2, 4, 5, 6)),
    "max_pool2d, ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGE),
    "avg_pool2d": (nn.AvgPool2d(3, 2, 1), IMAGE),
    "avg_pool2d, ceil": (nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), IMAGE),
    "avg_pool2d, own padding left out": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d((4, 3)), IMAGE),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d(5), SIGNAL),
    "global pooling": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "batch_norm": (nn.BatchNorm2d(4).eval(), IMAGE),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance_norm, by what training gathered": (trained(nn.InstanceNorm2d(4, track_running_stats=True)), IMAGE),
    "layer_norm": (nn.LayerNorm([9, 10]), IMAGE),
    "rms_norm": (nn.RMSNorm(10), IMAGE),
    "rms_norm without weight": (lambda x: functional.rms_norm(x, [9, 10], eps=0.1), IMAGE),
    "group_norm": (nn.GroupNorm(2, 4), IMAGE),
    "local_response_norm": (nn.LocalResponseNorm(3), IMAGE),
    "normalize": (functional.normalize, ROWS),
    "nearest": (resized(scale_factor=2, mode="nearest"), IMAGE),
    "counts": (lambda x: x.gather(1, (x[:, :7] > 0).sum(1, keepdim=True)), ROWS),
    "nearest to a size": (resized(size=(18, 30), mode="nearest"), IMAGE),
    "nearest to a size that no whole factor divides": (resized(size=(13, 7), mode="nearest"), IMAGE),
    "nearest by a scale that divides nothing": (resized(scale_factor=1.3, mode="nearest"), IMAGE),
    "nearest, exact": (resized(size=(13, 5), mode="nearest-exact"), IMAGE),
    "nearest of a signal": (resized(scale_factor=1.5, mode="nearest"), SIGNAL),
    "nearest of a volume": (resized(scale_factor=2, mode="nearest"), (2, 3, 2, 3, 4)),
    "bilinear": (resized(scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear to a size": (resized(size=(14, 7), mode="bilinear"), IMAGE),
    "bilinear, corners": (resized(scale_factor=3, mode="bilinear", align_corners=True), IMAGE),
    "bilinear by a scale that divides nothing": (resized(scale_factor=1.3, mode="bilinear"), IMAGE),
    "bilinear without aliases": (resized(size=(5, 6), mode="bilinear", antialias=True), IMAGE),
    "bicubic": (resized(size=(14, 7), mode="bicubic", align_corners=True), IMAGE),
    "bicubic without aliases": (resized(scale_factor=0.5, mode="bicubic", antialias=True), IMAGE),
    "grid_sample": (lambda x: functional.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False), IMAGE),
    "affine_grid": (lambda x: turned(x, align_corners=False), IMAGE),
    "affine_grid, corners": (lambda x: turned(x, align_corners=True), IMAGE),
    "pixel_shuffle": (nn.PixelShuffle(2), IMAGE),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), (1, 3, 6, 8)),
    "pad": (lambda x: functional.pad(x, (1, 2, 3, 0), value=0.5), IMAGE),
    "pad, reflect": (lambda x: functional.pad(x, (1, 2, 3, 0), mode="reflect"), IMAGE),
    "pad, replicate": (lambda x: functional.pad(x, (1, 2, 3, 0), mode="replicate"), IMAGE),
    "reshape, permute": (lambda x: x.permute(0, 2, 3, 1).reshape(2, -1, 8), IMAGE),
    "cat, chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), IMAGE),
    "split, stack": (lambda x: torch.stack(x.split(2, 1), 0), IMAGE),
    "unsqueeze, squeeze, expand": (lambda x: x.unsqueeze(1).expand(-1, 3, -1).squeeze(), ROWS),
    "expand to no axes": (lambda x: x * x.sum().expand(()), ROWS),
    "repeat": (lambda x: x.repeat(2, 1, 3), ROWS),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), ROWS),
    "flip": (lambda x: x.flip(1), ROWS),
    "roll": (lambda x: x.roll(2, 1), ROWS),
    "slices": (lambda x: x[:, 1:-1, ::2, -3:], IMAGE),
    "one row": (lambda x: x[:, -1], IMAGE),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0, 2])), IMAGE),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1], [7, 3]])), ROWS),
    "scatter": (lambda x: x.scatter(1, torch.tensor([[0, 2], [1, 3], [7, 5]]), 1.0), ROWS),
    "scatter_add": (lambda x: x.scatter_add(1, torch.tensor([[0, 0], [1, 3], [7, 7]]), x[:, :2]), ROWS),
    "scatter_reduce": (
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0], [1, 3], [7, 7]]), 2 * x[:, :2], "amax"),
        ROWS,
    ),
    "scatter of booleans": (lambda x: (x > 0).scatter(1, x.topk(2).indices, x.topk(2).values > 1), ROWS),
    "scatter_add of constants": (lambda x: x + torch.zeros(8).scatter_add(0, PLACES, torch.ones(3)), ROWS),
    "index_add": (lambda x: x.index_add(1, PLACES, x[:, :3], alpha=2), ROWS),
    "index_copy": (lambda x: x.index_copy(1, torch.tensor([5, 0]), x[:, :2]), ROWS),
    "index_put": (lambda x: torch.index_put(x, (torch.tensor([0, 2]),), x[:2]), ROWS),
    "written slice": (lambda x: written(x), ROWS),
    "tril, triu": (lambda x: x.tril() + x.triu(1), IMAGE),
    "one_hot": (lambda x: functional.one_hot(x.argmax(1), 8).float(), ROWS),
    "arange": (lambda x: x + torch.arange(8), ROWS),
    "lerp": (lambda x: torch.lerp(x, 2 * x.flip(0), 0.3), ROWS),
    "trunc": (lambda x: torch.trunc(3 * x), ROWS),
    "diff, between two ends": (lambda x: x.diff(2, 1, prepend=x[:, :1] - 1, append=x[:, -2:]), ROWS),
    "fmod": (lambda x: torch.fmod(x, 0.3), ROWS),
    "erfc": (torch.erfc, ROWS),
    "asinh, acosh": (lambda x: x.asinh() + (x.abs() + 1.5).acosh(), ROWS),
    "where, between scalars": (lambda x: torch.where(x > 0, 1.0, -0.5), ROWS),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -2.0), ROWS),
    "embedding": (lambda x: functional.embedding(x.argmax(1), torch.arange(40.0).reshape(8, 5)), ROWS),
    "unfold": (lambda x: functional.unfold(x, 3, stride=2), IMAGE),
    "unfold, dilated": (lambda x: functional.unfold(x, (3, 2), dilation=2, padding=(1, 2)), IMAGE),
    "fold": (lambda x: functional.fold(functional.unfold(x, 3, 2, 1, 2), IMAGE[2:], 3, 2, 1, 2), IMAGE),
    "fold beyond the blocks": (lambda x: functional.fold(x, (6, 7), 2, stride=3), (2, 12, 4)),
    "diff": (lambda x: torch.diff(x, dim=1), ROWS),
    "meshgrid": (lambda x: torch.stack(torch.meshgrid(x[0], x[1], indexing="ij")), ROWS),
    "a factor in a sum": (
        lambda x: (
            torch.add(x, x.flip(0), alpha=3),
            torch.sub(x, x.flip(1), alpha=0.25),
            torch.rsub(x, x.flip(0), alpha=2),
            torch.add(x, 2, alpha=3),
            torch.addcmul(x, x.flip(0), x.flip(1), value=3),
            torch.addcdiv(x, x.flip(0), x.abs() + 1),
            torch.add((9 * x).int(), (5 * x).int(), alpha=2),
        ),
        ROWS,
    ),
    "quotients of integers": (
        lambda x: tuple(
            divide((20 * x).int(), torch.tensor([[3], [-4], [7]], dtype=torch.int32)) for divide in INTEGER_DIVISIONS
        ),
        ROWS,
    ),
    "powers of two": (lambda x: (2**x, 2 ** (9 * x).int().abs(), x**2, 3**x), ROWS),
    "products of integers and floats": (
        lambda x: ((5 * x).int() @ torch.arange(16, dtype=torch.int32).reshape(8, 2), (5 * x).int().float() @ x.T),
        ROWS,
    ),
    "casts that lose what follows would ask for": (
        lambda x: (x.int().bool(), x.bool(), x.long().bool().float(), (x > 0).int().bool()),
        ROWS,
    ),
    "halves to the even": (lambda x: ((x * 4).trunc() / 2).round() + torch.round(x, decimals=1), ROWS),
    "triangles of infinities": (
        lambda x: ((x + torch.full((3, 8), -torch.inf).triu(1)).softmax(1), (x / 0.0).tril(-1), (x > 0).triu(1)),
        ROWS,
    ),
    "log_softmax of what lies far apart": (lambda x: (300 * x).log_softmax(1), ROWS),
    "lgamma": (lambda x: (torch.lgamma(3 * x), torch.lgamma(x.abs() * 9)), ROWS),
    "logarithms down to zero": (lambda x: (x.relu().log(), x.relu().log2(), (4 * x).long().abs().log10()), ROWS),
    "one value under many names": (
        lambda x: (lambda y: (x, y, x, y, torch.ones(2), y > 0, y.int(), y.int()))(x.relu()),
        ROWS,
    ),
    "vectors": (lambda x: (x @ torch.arange(8.0), x[0] @ x[1], x[0] @ x.T), ROWS),
    "an outer product of integers and floats": (lambda x: torch.outer(torch.arange(4), x[0]) + x[1], ROWS),
    "means and sums in another dtype": (
        lambda x: (lambda y: (y.mean(dtype=torch.float32), y.sum(1, dtype=torch.float32), y.sum(dtype=torch.int64)))(
            (9 * x).int()
        ),
        ROWS,
    ),
    "functions of integers": (
        lambda x: (lambda y: (y.exp(), y.abs().sqrt(), y.sigmoid(), y.tanh(), functional.relu(y), y.abs().log()))(
            (9 * x).int()
        ),
        ROWS,
    ),
    "the index of the greatest of all": (lambda x: (x.argmax(), x.argmin(keepdim=True)), ROWS),
    "products of complex numbers": (
        lambda x: (
            torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(x.flip(1))).real,
            torch.fft.irfft(torch.fft.rfft(x) / 2),
        ),
        ROWS,
    ),
    "rows by a mask": (lambda x: torch.index_put(x, (x[:, 0] > 0,), torch.tensor(0.5)), ROWS),
    "means over the edge": (tuple_of(*(nn.AvgPool2d(*how, ceil_mode=True) for how in EDGES)), IMAGE),
    "means over the edge, without the padding": (
        tuple_of(*(nn.AvgPool2d(*how, ceil_mode=True, count_include_pad=False) for how in EDGES)),
        IMAGE,
    ),
    "means over the edge of one and three axes, and by a divisor": (
        lambda x: (
            functional.avg_pool1d(x[:, 0], 5, 3, 2, ceil_mode=True),
            functional.avg_pool3d(x[:, None], 3, 2, 1, ceil_mode=True),
            functional.avg_pool2d(x, 2, divisor_override=3),
        ),
        IMAGE,
    ),
    "greatest over the edge": (
        lambda x: (
            *(functional.max_pool2d(x, *how, ceil_mode=True) for how in EDGES),
            functional.max_pool3d(x[:, None], 3, 2, 1, ceil_mode=True),
        ),
        IMAGE,
    ),
    "rnn": (First(nn.RNN(8, 6, batch_first=True), 1), (2, 5, 8)),
    "gru": (First(nn.GRU(8, 6, batch_first=True), 1), (2, 5, 8)),
    "cell of a gru": (Repeated(nn.GRUCell(8, 8)), ROWS),
    "lstm": (First(nn.LSTM(8, 6, batch_first=True), 1), (2, 5, 8)),
}


@contextlib.contextmanager
def fused_attention_off():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def written(x):
    y = x.clone()
    y[:, 2:4] = 0.5
    return y


def put(x):
    y = x.clone()
    y[:, torch.tensor([1, -1])] = x[:, :2, :1]
    y[..., torch.arange(4), torch.arange(4)] += 0.5
    return y


def unpooled(x):
    return functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape)


def hot(x):
    return torch.zeros(x.shape[0], 8).scatter_(1, x.argmax(1, keepdim=True), 1.0)


def looped(x):
    """As a graph network adds each node's own messages to those of its neighbors."""
    rows = torch.arange(x.shape[0])
    messages = x[torch.cat([rows, rows])] * 2
    targets = torch.cat([rows.flip(0), rows]).view(-1, 1).expand_as(messages)
    return torch.zeros_like(x).scatter_add_(0, targets, messages)


def grouped(x):
    groups = torch.tensor([[0, 1, 1, 2, 0, 2, 2, 1]]).expand(x.shape[0], -1)
    return x.new_zeros(x.shape[0], 3).scatter_add(1, groups, x)


def windows(x):
    n, channels, high, wide = x.shape
    parts = x.permute(0, 2, 3, 1).reshape(n, high // 4, 4, wide // 5, 5, channels)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, 20, channels)


def shifted_and_back(x):
    """As a Swin block does, and at last with no axis beside the neighbor that it had."""
    parts = windows(x.roll((-2, 1), (2, 3))).softmax(1).reshape(-1, 2, 2, 4, 5, 4)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(x.shape).roll((2, -1), (2, 3))


PROJECTION = torch.linspace(-1, 1, 24 * 4).view(24, 4).sin()


def windowed(x):
    """Queries, keys and values of windows, as Hiera has them: 3, batch, heads, windows, tokens, channels."""
    tokens = functional.linear(x.permute(0, 2, 3, 1).flatten(1, 2), PROJECTION)
    return tokens.reshape(x.shape[0], -1, 4, 3, 2, 4).permute(3, 0, 4, 2, 1, 5)


def pooled_windows(x):
    q, k, v = windowed(x).unbind(0)
    q = q.view(x.shape[0], 2, 4, 5, -1, 4).amax(3)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 3).reshape(x.shape[0], -1, 8)


def picked_windows(x):
    """One by one, along other axes, and with an op between that reads what is left."""
    every = windowed(x)
    return every[0] * every[-1], every[:, :, 1].amin(0), every.mean(3)


def unrolled(x):
    """Cells of two by two, and again, each time with the neighbors in the batch."""
    for _ in range(2):
        n, high, wide, channels = x.shape
        cells = x.view(n, high // 2, 2, wide // 2, 2, channels)
        x = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return x.reshape(-1, 16, 6)


def with_a_token(x):
    """A token before the others in each row, and heads whose size only -1 names."""
    tokens = torch.cat([PROJECTION[:1, None].expand(x.shape[0], -1, -1), x], 1)
    q, k, v = functional.linear(tokens, PROJECTION).reshape(*tokens.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v)


def proven(function, shape, folder, *, convert=coreml.convert_trace, free=False):
    """What comes of a function against PyTorch: in that shape, and where its first axis is free in others too."""
    torch.manual_seed(0)
    module, x = Whole(function).eval(), torch.randn(shape)
    batch = {0: torch.export.Dim.DYNAMIC} if free else None

    def described(name, tensor):
        sizes = ("batch", *tensor.shape[1:]) if free else tuple(tensor.shape)
        return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), sizes)

    def answers(x):
        answer = module(x)
        return {f"output_{i}": each for i, each in enumerate(answer if isinstance(answer, tuple) else (answer,))}

    # off, as `formats/torchscript.py` has it
    with torch.no_grad(), fused_attention_off():
        if convert is coreml.convert_trace:
            torch.jit.trace(module, (x,), check_trace=False).save(str(folder / "source.pt2"))
        else:
            torch.export.save(torch.export.export(module, (x,), dynamic_shapes=[(batch,)]), folder / "source.pt2")
        outputs = tuple(described(name, each) for name, each in answers(x).items())
        spec = ExportSpec((described("x", x),), outputs, sizes={"batch": len(x)})
        convert(folder / "source.pt2", folder / "m.mlpackage", spec, precision="float32")
        run = coreml.package(coreml._evaluated(folder / "m.mlpackage", 1), spec)
        for rows in (len(x), 1, 5) if free else (len(x),):
            x = torch.randn(rows, *shape[1:])
            reference = {name: each.numpy() for name, each in answers(x).items()}
            parity = compare(run({"x": x.numpy()}), reference, Tolerance.for_precision("float32"))
            assert parity.passed, parity.reason


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_evaluates_to_what_pytorch_computes(name, tmp_path):
    proven(*FUNCTIONS[name], tmp_path)


def bicubic(x):
    grid = functional.affine_grid(
        x.new_tensor([[[0.9, 0.2, 0.1], [-0.1, 0.8, 0.3]]]), (1, 2, 5, 4), align_corners=False
    )
    grid = grid.expand(x.shape[0], -1, -1, -1)
    return functional.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)


def reflected(x):
    """In two modes: only the one that Core ML lacks is decomposed, since it lacks parts of the other."""
    nearest = functional.grid_sample(x, x[:, :2, :5].permute(0, 2, 3, 1), "nearest", "reflection", align_corners=False)
    return bicubic(x), nearest


def test_a_grid_is_sampled_bicubically_by_what_core_ml_has(tmp_path):
    proven(reflected, (3, 2, 6, 7), tmp_path, convert=coreml.convert_program)


def test_an_operator_that_cannot_be_translated_is_named_with_its_mode(tmp_path):
    mode = r"grid_sampler\(interpolation_mode=2, padding_mode=1, align_corners=False\): KeyError"
    with pytest.raises(RuntimeError, match=mode):
        proven(bicubic, (3, 2, 6, 7), tmp_path)


# --- where Core ML's own semantics are not PyTorch's ------------------------------------------------------------------

ROW = torch.tensor([[1.0, 2.0, 3.0]])
AHEAD, BEHIND = torch.tensor([0, 2]), torch.tensor([0, -1])


def pooled(x, **how):
    return OPS["avg_pool"](x[:, None], torch.tensor([2]), torch.tensor([2]), **how)[:, 0].tolist()


def test_padding_beyond_the_edge_counts_in_an_average():
    assert pooled(ROW, ceil_mode=True) == [[1.5, 1.5]]
    assert pooled(ROW, ceil_mode=True, exclude_padding_from_average=True) == [[1.5, 3.0]]
    assert functional.avg_pool1d(ROW, 2, ceil_mode=True).tolist() == [[1.5, 3.0]], "as PyTorch always has it"


def test_a_window_beyond_the_edge_is_kept_where_there_is_no_padding():
    one, three = torch.tensor([1]), torch.tensor([3])
    assert OPS["max_pool"](torch.ones(1, 1, 3), one, three, ceil_mode=True).tolist() == [[[1.0, -torch.inf]]]
    assert functional.max_pool1d(torch.ones(1, 1, 3), 1, 3, ceil_mode=True).shape == (1, 1, 1)


def test_a_power_of_two_is_a_square_whichever_side_the_two_is_on():
    two = torch.tensor(2.0)
    assert OPS["pow"](two, ROW).tolist() == OPS["pow"](ROW, two).tolist() == [[1.0, 4.0, 9.0]]
    assert OPS["pow"](torch.tensor(3.0), ROW).tolist() == [[3.0, 9.0, 27.0]]


def test_a_floor_of_a_quotient_is_not_corrected_by_the_remainder():
    one, tenth = torch.tensor(1.0), torch.tensor(0.1)
    assert OPS["floor_div"](one, tenth) == 10
    assert torch.floor_divide(one, tenth) == 9
    assert OPS["floor_div"](torch.tensor(-7), torch.tensor(2)) == -4


STATE, WEIGHTS = torch.zeros(1, 3), torch.ones(12, 3)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: OPS["lstm"](ROW[None], STATE, STATE, WEIGHTS, WEIGHTS, clip=torch.tensor(1.0)), "lstm with clip"),
        (lambda: OPS["rnn"](ROW[None], STATE, WEIGHTS[:3], WEIGHTS[:3], activation="scaled_tanh"), "scaled_tanh"),
        (lambda: OPS["resize_nearest_neighbor"](ROW[None], torch.tensor(1), torch.tensor(4)), "resize of 3 to 4"),
        (
            lambda: OPS["resize"](ROW, torch.tensor([6]), torch.tensor(1), "NEAREST_NEIGHBOR", "ALIGN_CORNERS"),
            "sampling mode ALIGN_CORNERS",
        ),
    ],
)
def test_behavior_that_the_reference_leaves_open_is_not_guessed(call, what):
    with pytest.raises(CannotRun, match=what):
        call()
    assert "gru" not in OPS, "of its reset Apple's documents say two things"


def test_a_linear_layer_of_integers_does_not_run():
    with pytest.raises(ValueError, match="a linear layer of integers"):
        OPS["linear"](torch.ones(1, 2, dtype=torch.int32), torch.ones(3, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("op", "rest"),
    [
        ("gather", {"x": ROW, "indices": BEHIND, "axis": 1}),
        ("gather_along_axis", {"x": ROW, "indices": BEHIND[None], "axis": 1}),
        ("gather_nd", {"x": ROW[0], "indices": BEHIND[:, None]}),
        ("scatter", {"data": ROW, "indices": BEHIND, "updates": ROW[:, :2], "axis": 1}),
        ("scatter_along_axis", {"data": ROW, "indices": BEHIND[None], "updates": ROW[:, :2], "axis": 1}),
        ("scatter_nd", {"data": ROW[0], "indices": BEHIND[:, None], "updates": ROW[0, :2]}),
    ],
)
def test_a_negative_index_counts_from_the_end_only_before_ios_17(op, rest):
    from_the_start = {**rest, "indices": AHEAD.reshape(rest["indices"].shape)}
    assert OPS[op](**rest).tolist() == OPS[op](**from_the_start).tolist()
    assert OPS[op](**from_the_start, validate_indices=torch.tensor(False)).tolist() == OPS[op](**rest).tolist()
    with pytest.raises(ValueError, match="an index is negative"):
        OPS[op](**rest, validate_indices=torch.tensor(False))


@pytest.mark.parametrize("function", [put, unpooled])
def test_a_function_that_a_trace_loses_is_converted_by_torch_export(function, tmp_path):
    proven(function, (2, 4, 6, 8), tmp_path, convert=coreml.convert_program, free=True)


@pytest.mark.parametrize("function", [hot, grouped, looped])
def test_a_scatter_into_rows_of_a_dynamic_batch(function, tmp_path):
    proven(function, ROWS, tmp_path, free=True)


@pytest.mark.parametrize("norm", ["backward", "forward", "ortho"])
def test_a_fourier_transform_of_a_dynamic_batch(norm, tmp_path):
    proven(lambda x: torch.fft.fftn(x, (8, 6), (1, 2), norm).real, (2, 5, 7), tmp_path, free=True)


@pytest.mark.parametrize("function", [windows, shifted_and_back, pooled_windows, picked_windows])
def test_windows_of_a_dynamic_batch_pass_through_five_axes(function, tmp_path):
    proven(function, (2, 4, 8, 10), tmp_path, free=True)


def test_a_dynamic_batch_grows_while_axes_move_into_it(tmp_path):
    proven(unrolled, (2, 8, 8, 6), tmp_path, free=True)


def test_sizes_beside_a_dynamic_batch_stay_known(tmp_path):
    proven(with_a_token, (2, 6, 4), tmp_path, free=True)


def columns(x):
    """Blocks of an image of dynamic width, here the batch's axis, beside a known batch and a dynamic one."""
    return functional.unfold(x.T[None, :, None], (1, 3), padding=(0, 1)), functional.unfold(x[:, None, None], (1, 3))


def ruler(x):
    """Evenly spaced numbers, as many as an axis has, of dynamic and of known size."""
    rows, width = x.shape
    places = torch.meshgrid(torch.linspace(0.5, rows - 0.5, rows), torch.linspace(0, width - 1, width), indexing="ij")
    return torch.stack(places, -1) * x[..., None]


@pytest.mark.parametrize("function", [columns, ruler])
def test_sizes_that_only_the_run_knows(function, tmp_path):
    proven(function, ROWS, tmp_path, free=True)


def distinct(x):
    """The distinct elements, which may be a single one, and the places and counts of those with a fraction."""
    values, places, counts = torch.unique((2 * x).round() / 2, return_inverse=True, return_counts=True)
    return values, places, counts, torch.unique(x.abs().clamp(max=0.0))


def slices(x):
    """Distinct rows in their order, and runs of equal elements."""
    rough = x.clamp(-1, 1).round()
    rows, which, counts = torch.unique(rough[:, :2], dim=0, return_inverse=True, return_counts=True)
    return rows, which, counts, *torch.unique_consecutive(rough, return_counts=True)


TURNS = torch.polar(torch.linspace(1, 2, 2), torch.linspace(0, 3, 2))


def rotated(x):
    """Pairs turned by complex constants, as by rotary positions, and multiplied by a complex matrix."""
    pairs = torch.view_as_complex(x[:, :4].reshape(-1, 2, 2))
    mixed = pairs @ torch.complex(torch.eye(2), torch.ones(2, 2))
    return torch.view_as_real(pairs * TURNS).flatten(1), mixed.real, mixed.imag


def classes(x):
    """Integers within one limit, and within two."""
    whole = (2 * x.abs()).long()
    return functional.one_hot(whole.clamp(max=2), 3), functional.one_hot(whole[:, :1].clamp(1, 3), 4)


def stable(x):
    """Sorted with ties in their order, down and up."""
    values, places = torch.sort(x.round(), dim=1, descending=True, stable=True)
    return values, places, x.round().argsort(dim=0, stable=True), x.sort(1).values


@pytest.mark.parametrize("function", [distinct, slices, rotated, classes, stable])
@pytest.mark.parametrize("convert", [coreml.convert_trace, coreml.convert_program])
def test_both_routes_have_functions_that_coremltools_lacks_or_gets_wrong(function, convert, tmp_path):
    proven(function, ROWS, tmp_path, convert=convert, free=True)


class Unset(nn.Module):
    """A threshold that is NaN until it is found, and chosen by scalars alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def forward(self, x):
        half = torch.where(self.threshold.isnan(), x.mean() * 0.5, self.threshold)
        return torch.where(self.threshold.isnan(), x, x - self.threshold) - half


@pytest.mark.parametrize("convert", [coreml.convert_trace, coreml.convert_program])
def test_a_weight_may_be_nan(convert, tmp_path):
    proven(Unset(), ROWS, tmp_path, convert=convert, free=True)
