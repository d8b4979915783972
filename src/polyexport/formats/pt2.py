"""PT2: PyTorch's own graph of a whole program, the source that most other formats are made from.

https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

from pathlib import Path

from polyexport.format import MODULE, Format, Route, Snippet
from polyexport.spec import ExportSpec, Runner


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace the module with `torch.export` and dynamic axes."""
    import torch

    from polyexport.capture import snapshot
    from polyexport.capture.calls import example_inputs
    from polyexport.tracing.constant_masks import remove_constant_masks
    from polyexport.tracing.decompositions import decomposed
    from polyexport.tracing.dropouts import remove_dropouts
    from polyexport.tracing.exportable import exportable
    from polyexport.tracing.exported_program import export_program, subclasses_left_out

    inputs = example_inputs(source, spec)
    loaded = snapshot.load(source, spec.output_names)
    with decomposed(), exportable(loaded, dynamic=spec.is_dynamic) as traced, subclasses_left_out():
        traced.requires_grad_(False)  # else converters choose differentiable attention, which has other strides
        program = export_program(traced, inputs, [tensor.dynamic for tensor in spec.inputs])
    remove_dropouts(program)
    remove_constant_masks(program)
    program.example_inputs = None  # real rows, in a pickle that loading the program would run
    for graph in filter(lambda part: isinstance(part, torch.fx.GraphModule), program.graph_module.modules()):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # the lines of the user's code, with their paths
    torch.export.save(program, target, extra_files=spec.extra_files)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run the saved program with PyTorch."""
    import torch

    from polyexport.capture.flatten import as_runner

    torch.set_num_threads(threads)
    return as_runner(torch.export.load(path).module(), spec)


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import torch

model = torch.export.load("{{ path }}").module()
batch = np.load("{{ batch }}")
with torch.inference_mode():
    outputs = model(*(torch.from_numpy(batch[name]) for name in {{ names | tojson }}))
""",
    ),
)


FORMAT = Format(
    name="pt2",
    aliases=("torch_export",),
    description="torch.export program, for PyTorch 2 and everything that is built from it",
    url="https://docs.pytorch.org/docs/stable/export.html",
    artifact="model.pt2",
    graph="model.pt2",
    routes=(Route("export", upstream=MODULE, toolchain="torch", convert=convert),),
    load=load,
    targets=("server CPU",),
    slow_because="its module checks the inputs in Python at each call",
    snippets=_SNIPPETS,
)
