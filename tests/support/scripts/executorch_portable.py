"""In the toolchain of ExecuTorch: what its quantizer, its partitioner and XNNPACK's delegate get wrong by themselves.

Prints the size of convolutions before a ReLU with weights in int8 as a share of that in float32. Asserts that XNNPACK
and the portable kernels both take a permuted tensor that several operators read, and that quantized models compute the
same where integers are computed with, where others than a convolution read its input, where a view of attention
follows, where a result is overwritten after it was copied, where numbers are small, and in recurrent layers; and that
embeddings are in integers too. Asserts that sums that a layer norm reads stay in float, that products of GPT-2's form
do not, that the runtime has as many threads as it is given, and that layers over long sequences are loops of any batch.

python executorch_portable.py FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import JumpFalseCall
from executorch.extension.pybindings import portable_lib

import bare  # noqa: F401  # before our package
from polyexport.formats import executorch, executorch_quantized as quantized
from polyexport.spec import ExportSpec, TensorSpec


class Readers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x).permute(0, 2, 1)
        return y.reshape(x.shape[0], -1), y.sum(1), y.softmax(-1).transpose(1, 2)


torch.manual_seed(0)
module, folder, free = Readers().eval(), Path(sys.argv[1]), torch.export.Dim.DYNAMIC
program = torch.export.export(module, (torch.rand(4, 3, 10),), dynamic_shapes=({0: free},))
torch.export.save(program, folder / "m.pt2")
outputs = tuple(TensorSpec(f"output_{i}", "float32", ("batch",)) for i in range(3))
spec = ExportSpec((TensorSpec("x", "float32", ("batch", 3, 10)),), outputs, {"batch": 4})
x = torch.rand(7, 3, 10)
for convert in (executorch.convert, executorch.convert_portable):
    convert(folder / "m.pt2", folder / "m.pte", spec)
    found = executorch.load(folder / "m.pte", spec, threads=1)({"x": x.numpy()})
    for array, tensor in zip(found.values(), module(x), strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-5)
assert portable_lib._threadpool_get_thread_count() == 1

layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU()]
module, x = torch.nn.Sequential(*layers).eval(), torch.rand(4, 3, 8, 8)
torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: free},)), folder / "c.pt2")
outputs = (TensorSpec("y", "float32", ("batch", 32, 4, 4)),)
np.savez(folder / "batch.npz", x=x.numpy())
spec = ExportSpec(
    (TensorSpec("x", "float32", ("batch", 3, 8, 8)),), outputs, {"batch": 4}, calibration=(folder / "batch.npz",)
)
bytes_of = {}
for convert in (executorch.convert, quantized.quantize_weights):
    convert(folder / "c.pt2", folder / "c.pte", spec)
    bytes_of[convert] = (folder / "c.pte").stat().st_size
found = executorch.load(folder / "c.pte", spec, threads=1)({"x": x.numpy()})
np.testing.assert_allclose(found["y"], module(x).detach().numpy(), atol=0.02)
share = bytes_of[quantized.quantize_weights] / bytes_of[executorch.convert]


class Shifted(torch.nn.Module):
    """Indices that are computed, and a convolution whose input, the result of a matrix, others read too."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(12, 36), torch.nn.Linear(36, 36)
        self.conv, self.head = torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(9, 5)

    def forward(self, ids):
        both = torch.cat([ids * 2 + 1, ids + 2], 1)
        image = self.linear(self.table(both)).transpose(1, 2).reshape(-1, 4, 9, both.shape[1])
        seen = self.conv(image)
        return seen.mean((2, 3)), self.head(image.transpose(2, 3)).flatten(1)


module, ids = Shifted().eval(), torch.randint(0, 5, (4, 3))
torch.export.save(torch.export.export(module, (ids,), dynamic_shapes=({0: free},)), folder / "s.pt2")
outputs = (TensorSpec("seen", "float32", ("batch", 8)), TensorSpec("read", "float32", ("batch", 120)))
np.savez(folder / "ids.npz", ids=ids.numpy())
spec = ExportSpec((TensorSpec("ids", "int64", ("batch", 3)),), outputs, {"batch": 4}, calibration=(folder / "ids.npz",))
for convert, near in (
    (quantized.quantize, 0.05),
    (quantized.quantize_weights, 0.05),
    (partial(quantized.store_in_4_bits, convolutions=True), 0.3),
):
    convert(folder / "s.pt2", folder / "s.pte", spec)
    loaded = quantized.load_quantized(folder / "s.pte", spec, threads=1)
    assert (loaded.shortfall, "in float" in loaded.remark) == ("", False)  # the table and odd rows too
    found = loaded({"ids": ids.numpy()})
    for array, tensor in zip(found.values(), module(ids), strict=True):
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(array, expected, atol=near * np.abs(expected).max())


class Attentive(torch.nn.Module):
    """A matrix product that takes attention's result as a view; all of it is small."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(8, 8) / 100)
        self.bias = torch.nn.Parameter(torch.zeros(1, 8))
        torch.nn.init.normal_(self.linear.weight, std=0.003)

    def forward(self, x):
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        seen = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)
        return self.linear(torch.addmm(self.bias, seen.view(-1, 8), self.weight).view(x.shape))


module, x = Attentive().eval(), torch.randn(4, 6, 8)
torch.nn.init.zeros_(module.linear.bias)
with torch.no_grad():
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: free},)), folder / "a.pt2")
np.savez(folder / "a.npz", x=x.numpy())
spec = ExportSpec(
    (TensorSpec("x", "float32", ("batch", 6, 8)),),
    (TensorSpec("y", "float32", ("batch", 6, 8)),),
    {"batch": 4},
    calibration=(folder / "a.npz",),
)
quantized.quantize(folder / "a.pt2", folder / "a.pte", spec)
loaded = quantized.load_quantized(folder / "a.pte", spec, threads=1)
assert (loaded.remark, loaded.shortfall) == ("", "")  # all weights are in int8
found, expected = loaded({"x": x.numpy()})["y"], module(x).detach().numpy()
np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


class Overwritten(torch.nn.Module):
    """A layer's result is doubled in place after it was copied."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        copy = y.clone()
        y.mul_(2)
        return self.second(y * copy)


module = Overwritten().eval()
with torch.no_grad():
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: free},)), folder / "o.pt2")
expected = module(x).detach().numpy()
for convert in (quantized.quantize, quantized.quantize_weights):
    convert(folder / "o.pt2", folder / "o.pte", spec)
    found = quantized.load_quantized(folder / "o.pte", spec, threads=1)({"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


class Residual(torch.nn.Module):
    """Sums that a layer norm reads, one of them by way of the other, and a last one that none reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

    def forward(self, x):
        path = x + self.first(x)
        path = path + self.first(path)
        return self.second(self.norm(path)) + path


class Recurrent(torch.nn.Module):
    """An LSTM and a GRU, whose states stay in float."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = torch.nn.LSTM(6, 8), torch.nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x.transpose(0, 1))[0].transpose(0, 1))[1].squeeze(0)


module, x = Recurrent().eval(), torch.randn(16, 2, 6)
with torch.no_grad():
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: free},)), folder / "l.pt2")
np.savez(folder / "l.npz", x=x.numpy())
ports = [(TensorSpec("x", "float32", ("batch", 2, 6)),), (TensorSpec("y", "float32", ("batch", 8)),)]
spec = ExportSpec(*ports, {"batch": 16}, calibration=(folder / "l.npz",))
for convert, near, remark in (
    (quantized.quantize, 0.05, ""),
    (quantized.store_in_4_bits, 0.3, "100% of its weights in 4 bits, 0% in 8 bits"),
):
    convert(folder / "l.pt2", folder / "l.pte", spec)
    loaded = quantized.load_quantized(folder / "l.pte", spec, threads=1)
    assert (loaded.remark, loaded.shortfall) == (remark, "")
    found, expected = loaded({"x": x.numpy()})["y"], module(x).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=near * np.abs(expected).max())


class Long(torch.nn.Module):
    """Layers over a sequence that is too long to be unrolled."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = torch.nn.LSTM(6, 8, bidirectional=True, batch_first=True), torch.nn.GRU(16, 8)
        self.rnn = torch.nn.RNN(8, 8, bias=False, nonlinearity="relu")

    def forward(self, x):
        made, (_, cells) = self.lstm(x)
        return self.rnn(self.gru(made.transpose(0, 1))[0])[0].transpose(0, 1), cells.transpose(0, 1)


module, steps = Long().eval(), executorch.UNROLLED + 1
with torch.no_grad():
    x = torch.randn(3, steps, 6)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: free},)), folder / "s.pt2")
    ports = (TensorSpec("y", "float32", ("batch", steps, 8)), TensorSpec("z", "float32", ("batch", 2, 8)))
    spec = ExportSpec((TensorSpec("x", "float32", ("batch", steps, 6)),), ports, {"batch": 3})
    executorch.convert(folder / "s.pt2", folder / "s.pte", spec)
    run = executorch.load(folder / "s.pte", spec, threads=1)
    for batch in (3, 1, 5, 2):  # a loop's states and outputs have the sizes of the call
        x = torch.randn(batch, steps, 6)
        for found, expected in zip(run({"x": x.numpy()}).values(), module(x), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
(chain,) = deserialize_pte_binary((folder / "s.pte").read_bytes()).program.execution_plan[0].chains
assert sum(isinstance(each.instr_args, JumpFalseCall) for each in chain.instructions) == 4  # two directions, two layers

x = torch.randn(4, 8)
module = torch.export.export(Residual().eval(), (x,), dynamic_shapes=({0: free},)).module()
np.savez(folder / "r.npz", x=x.numpy())
ports = [(TensorSpec(name, "float32", ("batch", 8)),) for name in "xy"]
spec = ExportSpec(*ports, {"batch": 4}, calibration=(folder / "r.npz",))
graph = quantized.calibrated(module, spec, dynamic=False).graph
sums = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
assert [["dequantize" in str(term.target) for term in node.args] for node in sums] == [[False, True]] * 2 + [[True] * 2]
print(share)
