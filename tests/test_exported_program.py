"""Programs of `torch.export`: traced without autograd, loaded again, and made into TorchScript."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from polyexport.formats import torchscript
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.tracing.exported_program import export_program, in_float32, load_program, subclasses_left_out
from polyexport.tracing.products import as_products

ROWS = ExportSpec((TensorSpec("x", "float32", ("batch", 10)),), (), {"batch": 4})


class Written(nn.Module):
    """Calls `answer` with a layer and its input."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self.layer, x)


def into_a_view(layer, x):
    y = layer(x).clone()
    head, tail = y.chunk(2, 1)
    tail[:, 1:3] += 2 * head[:, :2]
    y[y > 0.5] = 0.5
    return y


def no_grad_twice(layer, x):
    with torch.no_grad():
        y = layer(x)
        with torch.no_grad():
            y = layer(y)
    return y + x


def enable_grad(layer, x):
    with torch.enable_grad():
        return into_a_view(lambda x: layer(x).detach(), x)


def set_grad_enabled_twice(layer, x):
    with torch.set_grad_enabled(layer.training):
        y = layer(x)
    with torch.set_grad_enabled(True):
        return layer(y).detach()


def inference_mode(layer, x):
    with torch.inference_mode():
        return layer(x)


def autocast(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    with torch.autocast("cuda", enabled=False):
        return layer(y.float())


def checkpointed(layer, x):
    return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)


def asks_for_the_mode(layer, x):
    return layer(x) if torch.is_grad_enabled() else 2 * layer(x)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.where(x >= 0, 1.0, -1.0)


def function_of_autograd(layer, x):
    return Sign.apply(layer(x))


def unpooled(layer, x):
    pooled, places = functional.max_pool2d(layer(x).reshape(-1, 1, 1, 10), (1, 2), return_indices=True)
    return functional.max_unpool2d(pooled, places, (1, 2))


def sizes(layer, x):
    rows = x.shape[0]
    y = layer(x).reshape(rows, 2, 5).transpose(1, 2).reshape(rows, -1)
    return y + torch.arange(rows).unsqueeze(1) + torch.ones(rows, 1).expand(rows, 10) * rows


def traced(answer, folder):
    """The module, and its program that was saved and loaded again."""
    module = Written(answer).eval()
    program = export_program(module, (torch.randn(4, 10),), [(0,)])
    torch.export.save(program, folder / "model.pt2")
    return module, load_program(folder / "model.pt2")


MODES = (
    into_a_view,
    no_grad_twice,
    enable_grad,
    set_grad_enabled_twice,
    inference_mode,
    autocast,
    checkpointed,
    asks_for_the_mode,
)


@pytest.mark.filterwarnings("ignore:None of the inputs")  # of a checkpoint that has nothing to differentiate
@pytest.mark.parametrize("answer", MODES)
def test_a_program_runs_without_autograd_and_leaves_its_mode_alone(answer, tmp_path):
    module, program = traced(answer, tmp_path)
    assert not [node for node in program.graph.nodes if "grad" in str(node.target)]
    x = torch.randn(7, 10)
    with torch.no_grad():
        assert torch.equal(program.module()(x), module(x))
    assert "forward" not in module.__dict__


class Labeled(torch.Tensor):
    """As MONAI's and torchvision's own tensors."""


def test_a_subclass_that_forward_makes_is_left_out_of_a_program():
    module = Written(lambda layer, x: layer(x.as_subclass(Labeled)).as_subclass(torch.Tensor))
    with subclasses_left_out():
        program = export_program(module, (torch.randn(4, 10),), [(0,)])
    x = torch.randn(7, 10)
    assert isinstance(x.as_subclass(Labeled), Labeled)
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_program_is_traced_with_inputs_that_a_trace_before_had_marked():
    x = torch.randn(4, 10)
    with pytest.raises(Exception, match="which makes it a constant"):
        export_program(Written(lambda layer, x: layer(x) + torch.ones(4, 1)), (x,), [(0,)])
    export_program(Written(lambda layer, x: layer(x) + torch.ones(4, 1)), (x,), [()])


@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore::DeprecationWarning")
@pytest.mark.parametrize("answer", [checkpointed, function_of_autograd, unpooled, sizes, into_a_view])
def test_torchscript_is_made_of_a_program_for_any_batch(answer, tmp_path):
    module, _ = traced(answer, tmp_path)
    torchscript.convert_program(tmp_path / "model.pt2", tmp_path / "model.torchscript", ROWS)
    x = torch.randn(7, 10)
    with torch.no_grad():
        assert torch.equal(torch.jit.load(tmp_path / "model.torchscript")(x), module(x))


class Precise(torch.nn.Module):
    """Computes in float64 with a buffer, a constant and a range, as positions in RT-DETR are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4, dtype=torch.float64))
        self.constant = torch.rand(4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        omega = 1.0 / 100.0 ** (torch.arange(4, dtype=torch.float64) / 4)
        return (
            x.double().pow(2.5) * omega * self.scale + self.constant + torch.tensor([1.0, 2, 3, 4]).double()
        ).float()


def test_float64_within_a_program_becomes_float32():
    module, x = Precise().eval(), torch.rand(2, 4)
    narrow = in_float32(torch.export.export(module, (x,), strict=False).module(), torch.float64)
    torch.testing.assert_close(narrow(x), module(x))
    again = torch.export.export(narrow, (x,), strict=False)
    values = [node.meta["val"] for node in again.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert values
    assert not [value for value in values if value.dtype is torch.float64]


def test_a_program_with_a_constant_made_in_forward_can_be_exported_again(tmp_path):
    x = torch.rand(4, 3)
    program = export_program(Written(lambda layer, x: x * torch.tensor([1.0, 2.0, 3.0])), (x,), [(0,)])
    torch.export.save(program, tmp_path / "m.pt2")
    again = torch.export.export(load_program(tmp_path / "m.pt2").module(), (x,), strict=False).module()
    assert torch.equal(again(x), x * torch.tensor([1.0, 2.0, 3.0]))


def test_a_scripted_submodule_that_cannot_be_exported_is_named():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)).eval()
    with pytest.raises(RuntimeError, match=r"cannot export parts that torch.jit.script made \(0\)"):
        export_program(net, (torch.rand(2, 4),), [()])


class Reading(nn.Module):
    """Hands what it is given to a function that reads it."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read(x)


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda x: 2 if x.abs().max() > 1 else 3, "forward reads a value of its data into Python (SITE)"),
        (lambda x: sum(range(int(x.sum()))), "forward reads a value of its data into Python (SITE)"),
        (lambda x: 2 if torch.equal(x, x) else 3, "forward reads a value of its data into Python (SITE)"),
        (lambda x: len(f"{x.sum():.3f}"), "forward reads a value of its data into Python (SITE)"),
        (lambda x: float(x.numpy().max()), "torch.export refuses SITE: RuntimeError: .numpy() is not supported"),
        (
            lambda x: int(x.shape[0]),
            "forward uses axis 0 of input as 2 in Python, which makes it a constant: ",
        ),
    ],
    ids=["a branch", "a count", "equality", "a text", "an array", "a size"],
)
def test_code_that_cannot_be_exported_is_reported_with_its_line(read, why):
    with pytest.raises(RuntimeError) as raised:
        export_program(nn.Sequential(nn.Linear(4, 4), Reading(read)).eval(), (torch.rand(2, 4),), [(0,)])
    assert str(raised.value).startswith(why.replace("SITE", f"{Path(__file__).name}:{read.__code__.co_firstlineno}"))


class Products(nn.Module):
    """Convolutions of one and two dimensions with every setting."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Conv1d(6, 8, 3, stride=2, padding=2, dilation=2, bias=False)
        self.patches = nn.Conv2d(8, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.groups = nn.Conv2d(4, 4, 3, groups=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.groups(self.patches(self.rows(x).unflatten(2, (2, -1))))


@pytest.mark.parametrize(("convolutions", "left"), [(False, 3), (True, 1)])
def test_a_program_of_products_is_the_same_program(convolutions, left):
    torch.manual_seed(0)
    module, x = Products().eval(), torch.randn(3, 6, 11)
    program = export_program(module, [x], [[0]])
    products = as_products(program, convolutions=convolutions)
    with torch.no_grad():
        for batch in (x, torch.randn(5, 6, 11)):
            torch.testing.assert_close(products(batch), module(batch), rtol=1e-4, atol=1e-6)
    called = [str(node.target) for node in products.graph.nodes if node.op == "call_function"]
    assert sum("conv" in each for each in called) == left
    assert not any("conv1d" in each for each in called)
    weights = {str(node.args[1].op) for node in products.graph.nodes if str(node.target) == "aten.linear.default"}
    assert weights <= {"get_attr"}  # a quantizer takes constants only
