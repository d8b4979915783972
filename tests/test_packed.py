"""Recurrent layers over packed sequences: what is traced in their place answers as they do, at other lengths too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from polyexport.capture.flatten import flat
from polyexport.tracing.decompositions import decomposed
from polyexport.tracing.exported_program import export_program
from polyexport.tracing.reads import frozen_sites

LAYERS = {
    "lstm, two layers, both ways": nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
    "lstm with a projection": nn.LSTM(6, 8, proj_size=3, batch_first=True),
    "lstm without biases": nn.LSTM(6, 8, bias=False),
    "gru, both ways": nn.GRU(6, 8, bidirectional=True),
    "rnn": nn.RNN(6, 5, batch_first=True),
    "rnn, relu": nn.RNN(6, 5, nonlinearity="relu"),
}


class Packed(nn.Module):
    """Padded sequences in; outputs with their padding, lengths and states out."""

    def __init__(self, layer: nn.RNNBase, *, whole: bool = True, sorts: bool = True) -> None:
        super().__init__()
        self.layer, self.whole, self.sorts = layer, whole, sorts

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=not self.sorts)
        answers, states = self.layer(packed, *state)
        total = x.shape[int(first)] if self.whole else None
        y, found = pad_packed_sequence(answers, batch_first=first, padding_value=-2.0, total_length=total)
        return y, found, *(states if isinstance(states, tuple) else (states,))


def sequences(layer: nn.RNNBase, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(len(lengths), 7, 6, generator=torch.Generator().manual_seed(len(lengths)))
    return x if layer.batch_first else x.transpose(0, 1).contiguous(), torch.tensor(lengths)


def same(found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tracer", ["jit", "export"])
@torch.no_grad()
def test_a_trace_keeps_lengths_and_any_batch(name, tracer):
    net = Packed(LAYERS[name]).eval()
    first, *others = (sequences(net.layer, lengths) for lengths in ([5, 7, 3, 6], [2, 6, 1, 3], [4, 7]))
    with decomposed(), frozen_sites():
        if tracer == "jit":
            traced = torch.jit.trace(net, first, check_trace=False)
        else:
            traced = export_program(net, first, [{1 - net.layer.batch_first}, {0}]).module()
    for inputs in (first, *others):
        same(traced(*inputs), net(*inputs))


@torch.no_grad()
def test_a_trace_ends_where_the_longest_sequence_does():
    net = Packed(LAYERS["gru, both ways"], whole=False, sorts=False).eval()
    with decomposed(), frozen_sites():
        traced = torch.jit.trace(net, sequences(net.layer, [7, 6, 5, 3]), check_trace=False)
    same(traced(*(inputs := sequences(net.layer, [5, 3, 2, 1]))), net(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("padding", [1e4, float("nan")])
@pytest.mark.parametrize("name", ["lstm, two layers, both ways", "gru, both ways"])
def test_what_is_after_an_end_does_not_matter(name, padding):
    net = Packed(LAYERS[name]).eval()
    x, lengths = sequences(net.layer, [5, 7, 3])
    x[tuple(torch.tensor([[0, 2], [5, 4]] if net.layer.batch_first else [[5, 4], [0, 2]]))] = padding
    right = net(x, lengths)
    with decomposed():
        same(net(x, lengths), right)


@torch.no_grad()
def test_a_given_state_begins_each_sequence():
    net = Packed(LAYERS["rnn"]).eval()
    inputs = (*sequences(net.layer, [5, 7, 3]), torch.randn(1, 3, 5))
    right = net(*inputs)
    with decomposed():
        same(net(*inputs), right)


@torch.no_grad()
def test_what_was_packed_before_the_trace_stays_packed():
    net, (x, lengths) = nn.LSTM(6, 8), sequences(nn.LSTM(6, 8), [7, 4])
    packed = pack_padded_sequence(x, lengths)
    with decomposed():
        found = net(packed)[0]
        padded, ends = pad_packed_sequence(found)
    assert torch.equal(found.data, net(packed)[0].data)
    assert torch.equal(padded, pad_packed_sequence(net(packed)[0])[0])
    assert ends.tolist() == [7, 4]


class PackedOut(nn.Module):
    """Returns the packed sequence itself."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]


@pytest.mark.parametrize("tracer", ["jit", "export"])
@torch.no_grad()
def test_a_packed_output_is_padded_with_its_lengths(tracer):
    layer = nn.GRU(6, 4, batch_first=True)
    first, other = sequences(layer, [5, 7, 3, 6]), sequences(layer, [7, 2])
    net = flat(PackedOut(layer), first, {})
    with decomposed(), frozen_sites():
        if tracer == "jit":
            traced = torch.jit.trace(net, first, check_trace=False)
        else:
            traced = export_program(net, first, [{0}, {0}]).module()
    for x, lengths in (first, other):
        padded, ends = traced(x, lengths)
        assert ends.tolist() == lengths.tolist()
        same((padded,), (net(x, lengths)[0],))
        assert not padded[1, int(lengths[1]) :].any()
    assert net.output_names == ("output_0_padded", "output_0_lengths")
