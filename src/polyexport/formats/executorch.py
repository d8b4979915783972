"""ExecuTorch: a program for phones and microcontrollers, with XNNPACK for the CPU, run here by its own runtime.

https://docs.pytorch.org/executorch/stable/

What XNNPACK does not take stays with ExecuTorch's portable kernels, inside the same file; where its partitioner fails
on a program as a whole, they take all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polyexport.format import Format, OnDevice, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, Runner
from polyexport.tracing.exported_program import load_program


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with XNNPACK's kernels as far as they reach."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    _lower(source, target, spec, [XnnpackPartitioner()])


def convert_portable(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with ExecuTorch's portable kernels alone."""
    _lower(source, target, spec, [])


def _lower(source: Path, target: Path, spec: ExportSpec, partitioners: list[Any]) -> None:
    """Lower the program of `torch.export`, exported once more with an upper bound for each dynamic axis."""
    import torch
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    module = load_program(source).module()
    bounds = spec.upper_bounds(64)  # memory is planned for them
    free = {called: torch.export.Dim(called, min=1, max=most) for called, most in bounds.items()}
    shapes = tuple({axis: free[called] for axis, called in tensor.dynamic.items()} for tensor in spec.inputs)
    inputs = tuple(
        torch.zeros(tensor.sized(lambda called: max(2, spec.sizes[called])), dtype=getattr(torch, tensor.dtype))
        for tensor in spec.inputs
    )
    program = torch.export.export(module, inputs, dynamic_shapes=shapes if spec.is_dynamic else None, strict=False)
    # its check of data types takes the first of several results for their list and asks how long it is: a free batch is
    # free no more
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(program, partitioner=partitioners, compile_config=config)
    lowered = edge.to_executorch()
    target.write_bytes(lowered.buffer)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it with ExecuTorch's runtime; it takes its threads from the machine."""
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    try:
        method = program.load_method("forward")
    except RuntimeError as error:  # it has a number for it
        if lacking := _lacking(path):
            raise RuntimeError(f"ExecuTorch's runtime has no kernel for {', '.join(lacking)}") from error
        raise

    def run(inputs: Arrays) -> Arrays:
        answers = method.execute([torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in spec.input_names])
        return {name: answer.numpy() for name, answer in zip(spec.output_names, answers, strict=True)}

    return run


def _lacking(path: Path) -> list[str]:
    """The operators of a file that the runtime has not."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.runtime import Runtime

    known = set(Runtime.get().operator_registry.operator_names)
    (plan,) = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    wanted = {f"{each.name}.{each.overload}" if each.overload else each.name for each in plan.operators}
    return sorted(wanted - known)


_SNIPPETS = (
    Snippet(
        "C++",
        """\
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

using namespace executorch::extension;
using executorch::aten::ScalarType;

int main() {
  Module model("{{ path }}");
{%- for input in inputs %}
  auto input{{ loop.index0 }} = zeros({ {{- input.shape | join(", ") -}} }, ScalarType::
    {{- {"int64": "Long", "int32": "Int", "bool": "Bool", "float16": "Half"}.get(input.dtype, "Float") }});
{%- endfor %}
  auto outputs = model.forward({
    {%- for input in inputs %}{{ ", " if loop.index0 }}input{{ loop.index0 }}{% endfor %}});
}
""",
    ),
    Snippet(
        "Python",
        """\
import numpy as np
import torch
from executorch.runtime import Runtime

program = Runtime.get().load_program("{{ path }}")
batch = np.load("validation_batch.npz")
inputs = [torch.from_numpy(batch[name]) for name in {{ names | tojson }}]
outputs = program.load_method("forward").execute(inputs)
""",
    ),
)


FORMAT = Format(
    name="executorch",
    aliases=("pte",),
    description="ExecuTorch program with XNNPACK, for phones and small devices",
    url="https://docs.pytorch.org/executorch/stable/",
    artifact="model.pte",
    routes=(
        Route("xnnpack", upstream="pt2", toolchain="executorch", convert=convert),
        Route("portable", upstream="pt2", toolchain="executorch", convert=convert_portable),
    ),
    load=load,
    targets=("phone", "microcontroller"),
    snippets=_SNIPPETS,
    on_device=OnDevice(("executorch",)),
)
