"""IMX500: a program as the layers that Sony's toolkit knows, what its converter says, what is missing."""

from __future__ import annotations

import sys
from operator import attrgetter
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from polyexport.errors import ToolMissing
from polyexport.formats import imx500
from polyexport.spec import ExportSpec, TensorSpec
from polyexport.tracing.exported_program import export_program
from polyexport.tracing.image_operators import with_image_operators


class Layers(torch.nn.Module):
    """Each layer that the toolkit quantizes the weights of, one of them twice, and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = torch.nn.BatchNorm2d(8, eps=1e-3)
        self.up = torch.nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1)
        self.linear = torch.nn.Linear(4, 4)
        self.scale = torch.nn.LayerNorm(4, bias=False)
        torch.nn.init.normal_(self.norm.weight)
        self.norm.running_mean += torch.rand(8)
        self.norm.running_var += torch.rand(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(self.conv(x)).relu())
        x = torch.nn.functional.max_pool2d(x, 2) + torch.nn.functional.avg_pool2d(x, 2)
        x = torch.nn.functional.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1)
        return self.scale(self.linear(torch.nn.functional.gelu(self.linear(x), approximate="tanh"))).softmax(-1)


def test_a_program_is_written_as_layers_that_compute_the_same():
    torch.manual_seed(0)
    module, x = Layers().eval(), torch.rand(1, 4, 8, 8)
    found = imx500.layers(export_program(module, (x,), [()]))
    kinds = sorted(type(found.get_submodule(node.target)).__name__ for node in found.graph.find_nodes(op="call_module"))
    assert kinds == ["BatchNorm2d", "Conv2d", "ConvTranspose2d", "LayerNorm", "Linear", "Linear"]
    called = {node.target for node in found.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if isinstance(target, torch._ops.OpOverload)]
    torch.testing.assert_close(found(x), module(x))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (torch.nn.Linear(4, 3), torch.rand(1, 5, 4)),
        (torch.nn.Conv1d(4, 6, 3, 2, 1, 1, 2), torch.rand(1, 4, 9)),
        (torch.nn.Linear(4, 3), torch.rand(1, 4)),
    ],
)
def test_layers_have_as_many_axes_as_the_converter_takes(module: torch.nn.Module, x: torch.Tensor):
    """Which has linear layers of two axes and of four, and convolutions of images alone."""
    found = imx500.layers(export_program(module.eval(), (x,), [()]))
    (layer,) = found.graph.find_nodes(op="call_module")
    ranks: list[int] = []
    found.get_submodule(layer.target).register_forward_hook(lambda *given: ranks.append(given[1][0].ndim))
    torch.testing.assert_close(found(x), module(x))
    assert ranks == [2 if x.ndim == 2 else 4]


def test_an_operator_that_computes_its_own_weight_stays_a_function():
    class Computed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, x @ x.T)

    x = torch.rand(3, 3)
    found = imx500.layers(export_program(Computed(), (x,), [()]))
    assert not list(found.graph.find_nodes(op="call_module"))
    torch.testing.assert_close(found(x), Computed()(x))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.BatchNorm1d(4), (1, 4, 6)),
        (torch.nn.BatchNorm1d(4), (1, 4)),
        (torch.nn.GroupNorm(2, 4), (1, 4, 6, 6)),
        (torch.nn.GroupNorm(2, 4, affine=False), (1, 4, 6)),
        (torch.nn.ELU(0.5), (1, 4, 6)),
        (torch.nn.AdaptiveAvgPool1d(2), (1, 4, 6)),
        (torch.nn.AvgPool1d(3, 2, 1), (1, 4, 6)),
        (torch.nn.MaxPool1d(2, dilation=2), (1, 4, 6)),
    ],
)
def test_what_the_toolkit_lacks_is_composed_of_what_it_has(module: torch.nn.Module, shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for name, weight in module.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name == "weight" else 0.0)
    for weight in module.buffers():
        weight += torch.rand(weight.shape) if weight.ndim else 0
    program = export_program(with_image_operators(export_program(module.eval(), (x,), [()]).module()), (x,), [()])
    found = imx500.layers(program)
    torch.testing.assert_close(found(x), module(x))
    left = {node.target for node in found.graph.nodes if node.op == "call_function"}
    assert not {target for target in left if "1d" in getattr(target, "__name__", "")}
    assert not left & {torch.group_norm, torch.nn.functional.elu, torch.squeeze}
    assert not [target for target in left if isinstance(target, torch._ops.OpOverload)]
    assert all(weight.ndim > 1 for weight in read_directly(found))


def test_a_softplus_is_a_series_that_is_near_for_any_number():
    x = torch.cat([torch.linspace(-4, 4, 801), torch.tensor([-1e4, -90.0, 90.0, 1e4])])[None]
    module = torch.nn.Softplus(beta=2)
    found = imx500.layers(export_program(with_image_operators(export_program(module, (x,), [()]).module()), (x,), [()]))
    assert torch.nn.functional.softplus not in {node.target for node in found.graph.nodes}
    torch.testing.assert_close(found(x), module(x), rtol=1e-6, atol=1.4e-4)


def read_directly(module: torch.fx.GraphModule) -> list[torch.Tensor]:
    """The weights that nodes read which are no layers."""
    return [attrgetter(str(node.target))(module) for node in module.graph.find_nodes(op="get_attr")]


def test_a_batch_norm_that_was_decomposed_is_a_layer_again():
    module, x = torch.nn.BatchNorm1d(4).eval(), torch.rand(1, 4, 6)
    program = export_program(module, (x,), [()]).run_decompositions({})
    found = imx500.layers(export_program(with_image_operators(program.module()), (x,), [()]))
    assert [type(found.get_submodule(each.target)) for each in found.graph.find_nodes(op="call_module")] == [
        torch.nn.BatchNorm2d
    ]
    torch.testing.assert_close(found(x), module(x))


def test_a_slice_of_everything_is_left_out():
    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.slice.Tensor(x, 1, 0, 4).amax(-1)

    x = torch.rand(1, 4, 6)
    found = imx500.layers(export_program(Whole(), (x,), [()]))
    assert [node.target for node in found.graph.nodes if node.op == "call_function"] == [torch.amax]
    torch.testing.assert_close(found(x), Whole()(x))


def test_the_sizes_of_a_layers_output_are_known():
    class Sliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)[:, 1:])[:, 1:].squeeze(1)

    x = torch.rand(1, 3, 6)
    module = Sliced().eval()
    torch.testing.assert_close(imx500.layers(export_program(module, (x,), [()]))(x), module(x))


def test_what_the_toolkit_raises_is_one_line(monkeypatch):
    def fails(*given):
        raise RuntimeError("ShapeProp error for: node=%embedding\n\nWhile executing %embedding\n" + "node\n" * 100)

    monkeypatch.setenv("MPLCONFIGDIR", "")  # convert sets it
    monkeypatch.setattr(imx500, "lacks", str)
    monkeypatch.setattr(imx500, "quantize", fails)
    monkeypatch.setattr(imx500, "load_program", lambda source: None)
    monkeypatch.setattr(imx500, "beyond", lambda program, spec: "")
    said = r"^Sony's toolkit fails on it, with RuntimeError: ShapeProp error for: node=%embedding While .{,170}$"
    with pytest.raises(RuntimeError, match=said):
        imx500.convert(Path("model.pt2"), Path("model.zip"), ExportSpec((), ()))


@pytest.mark.parametrize(
    ("module", "x", "why"),
    [
        (torch.nn.GRU(3, 4), torch.rand(1, 5, 3), "does not support recurrent layers, and the model has GRU"),
        (torch.nn.Embedding(5, 3), torch.tensor([[1, 2]]), "the model reads integers: x (int64)"),
        (torch.nn.Linear(3, 4), torch.rand(1, 3), ""),
    ],
)
def test_what_the_toolkit_lacks_is_named(module: torch.nn.Module, x: torch.Tensor, why: str):
    tensor = TensorSpec("x", str(x.dtype).removeprefix("torch."), tuple(x.shape))
    assert imx500.beyond(export_program(module.eval(), (x,), [()]), ExportSpec((tensor,), ())).endswith(why)


LISTED = """\
2026-11-27 22:25:11,942 ERROR : CODE: [INVOP] The network is not aligned with SDSP converter's restrictions. Errors are:
Node [Framework.nnir] op: FullyConnected, id: /linear/layer/MatMul, [Framework.onnx] op: MatMul, id: /MatMul, errors:
\tInput error - input index: 0, input node: /Transpose, reason: Only 2d input (N,D) or 4d input is supported
--------------------------------------------------
Node [Framework.nnir] op: Conv, id: /Conv, [Framework.onnx] op: Conv, id: /Conv, errors:
\tOnly 2d Op is supported. [/opt/uni/common/logger.py:179]
"""

SAID = """\
2026-11-26 20:07:02.443 INFO : CODE: [START] Starting SDSPconv
2026-11-26 20:07:15.040 ERROR: CODE: [CNVE] Conversion Error: Allocation failed: it needs more than 8 MB .
2026-11-26 20:07:15.047 ERROR: CODE: [FEFSUC] Failure in conversion process:
"""


def test_the_first_error_of_the_converter_is_the_reason():
    assert imx500._why(SAID) == "[CNVE] Conversion Error: Allocation failed: it needs more than 8 MB ."
    listed = (
        "FullyConnected /linear/layer/MatMul: Only 2d input (N,D) or 4d input is supported; Conv /Conv: Only 2d Op is"
    )
    assert imx500._why(LISTED).startswith(listed)
    assert imx500._why("killed") == "see its output in the log"


def test_an_archive_has_no_time(tmp_path: Path):
    for name, time in (("one", "Thu Nov 26 20:08:07 UTC 2026"), ("other", "Fri Nov 27 09:00:00 UTC 2026")):
        with ZipFile(tmp_path / f"{name}.made", "w") as archive:
            archive.writestr("manifest.json", f'{{"Date Info": "{time}", "Target": "IMX500"}}')
            archive.writestr("cfgA.bin", b"\0\1")
        imx500._pack(tmp_path / f"{name}.made", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with ZipFile(tmp_path / "one") as archive:
        assert archive.read("manifest.json") == b'{"Date Info": "", "Target": "IMX500"}'
        assert archive.read("cfgA.bin") == b"\0\1"


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the converter is for Python up to 3.12; what is said then differs"
)
def test_without_java_it_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert imx500.lacks().startswith("java is not on PATH, in which Sony's converter runs: ")
    with pytest.raises(ToolMissing, match="openjdk-17"):
        imx500.convert(tmp_path / "model.pt2", tmp_path / "packerOut.zip", ExportSpec((), ()))
