"""TorchScript: a traced module that runs in C++ and in old PyTorch, without Python.

https://docs.pytorch.org/docs/stable/jit.html
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from polyexport.format import MODULE, Format, Route, Snippet, Triton
from polyexport.spec import ExportSpec, Runner, example

if TYPE_CHECKING:
    import torch


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace the module with `torch.jit.trace`; axes stay dynamic unless the module's code fixes them."""
    from polyexport.capture import snapshot
    from polyexport.capture.calls import example_inputs
    from polyexport.tracing.decompositions import decomposed
    from polyexport.tracing.exportable import exportable

    loaded = snapshot.load(source, spec.output_names)
    with decomposed(), exportable(loaded, dynamic=spec.is_dynamic) as model:
        _trace(model, example_inputs(source, spec), target, spec)


def convert_script(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace the module with its data-dependent submodules scripted, so that both branches are kept."""
    from polyexport.capture import snapshot
    from polyexport.capture.calls import example_inputs
    from polyexport.capture.flatten import to_arrays
    from polyexport.tracing.decompositions import decomposed
    from polyexport.tracing.exportable import exportable
    from polyexport.tracing.scripted import script_branches

    inputs = example_inputs(source, spec)
    model = snapshot.load(source, spec.output_names)
    script_branches(model, to_arrays(spec.input_names, inputs))
    with decomposed(), exportable(model, dynamic=spec.is_dynamic):
        _trace(model, inputs, target, spec)


def convert_program(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace the program of `torch.export`, which has operators only: tracing Python fails on functions of autograd."""
    import torch

    from polyexport.tracing.exported_program import load_program

    inputs = tuple(map(torch.from_numpy, example(spec).values()))
    _trace(_operators(load_program(source)), inputs, target, spec)


def _operators(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module whose sizes can be traced.

    Traced sizes are tensors, which the overloads of operators refuse, but the Python functions of the same names
    accept.
    """
    import torch

    module = program.module(check_guards=False)
    graph = torch.fx.GraphModule(module, module.graph)  # without the hooks that check inputs, which cannot be traced
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.target = _size
        elif isinstance(node.target, torch._ops.OpOverload) and any(map(_is_size, node.all_input_nodes)):
            name = node.target._schema.name.removeprefix("aten::")
            node.target = getattr(torch, name, None) or getattr(torch.Tensor, name, node.target)
    graph.recompile()
    return graph


def _size(tensor: torch.Tensor, axis: int) -> int:
    return tensor.shape[axis]


def _is_size(node: torch.fx.Node) -> bool:
    import torch

    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _trace(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], target: Path, spec: ExportSpec) -> None:
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is deprecated, but mobile and C++ still run it
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module, inputs, strict=False, check_trace=False)
        torch.jit.save(traced, str(target), _extra_files=spec.extra_files)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run the saved trace with PyTorch."""
    import torch

    from polyexport.capture.flatten import as_runner

    torch.set_num_threads(threads)
    return as_runner(torch.jit.load(str(path)).eval(), spec)


CPP_INPUTS = """\
{%- for input in inputs %}
      torch::zeros({ {{- input.shape | join(", ") -}} }, torch::k
    {{- input.dtype | capitalize | replace("Ui", "UI") | replace("Bf", "BF") }}),  // {{ input.name }}
{%- endfor %}
"""
"""Code for a tensor of zeros for each input in libtorch; a part of snippets."""

_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import torch

model = torch.jit.load("{{ path }}").eval()
batch = np.load("{{ batch }}")
with torch.inference_mode():
    outputs = model(*(torch.from_numpy(batch[name]) for name in {{ names | tojson }}))
""",
    ),
    Snippet(
        "C++",
        """\
#include <torch/script.h>

int main() {
  c10::InferenceMode inference;
  auto model = torch::jit::load("{{ path }}");
  auto outputs = model.forward({
"""
        f"{CPP_INPUTS}"
        """\
  });
}
""",
    ),
)


FORMAT = Format(
    name="torchscript",
    aliases=("jit",),
    description="TorchScript trace, for libtorch in C++",
    url="https://docs.pytorch.org/docs/stable/jit.html",
    artifact="model.torchscript",
    graph="model.torchscript",
    routes=(
        Route("trace", upstream=MODULE, toolchain="torch", convert=convert),
        Route("script", upstream=MODULE, toolchain="torch", convert=convert_script),
        Route("pt2", upstream="pt2", toolchain="torch", convert=convert_program),
    ),
    load=load,
    targets=("server CPU",),
    triton=Triton("pytorch", "model.pt", indexed=True),
    snippets=_SNIPPETS,
)
