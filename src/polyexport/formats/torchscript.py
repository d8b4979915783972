"""TorchScript: a traced module that runs in C++ and in old PyTorch, without Python.

https://docs.pytorch.org/docs/stable/jit.html
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from polyexport.format import MODULE, Format, Route, Runner, Snippet
from polyexport.spec import ExportSpec


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Trace the module with `torch.jit.trace`; all axes stay as free as the module's own code leaves them."""
    import torch

    from polyexport.capture import snapshot
    from polyexport.tracing.decompositions import written_out
    from polyexport.tracing.exportable import exportable

    with (
        warnings.catch_warnings(),
        torch.inference_mode(),
        written_out(),
        exportable(snapshot.load(source)) as model,
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # it is frozen, and still what mobile and C++ run
        traced = torch.jit.trace(model, snapshot.example(source, spec), strict=False, check_trace=False)
        torch.jit.save(traced, str(target), _extra_files={"polyexport.json": json.dumps(dict(spec.metadata))})


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run the saved trace with PyTorch."""
    import torch

    from polyexport.capture.flatten import as_runner

    torch.set_num_threads(threads)
    return as_runner(torch.jit.load(str(path)).eval(), spec)


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import torch

model = torch.jit.load("{{ path }}").eval()
batch = np.load("validation_batch.npz")
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
{%- for input in inputs %}
      torch::zeros({ {{- input.shape | join(", ") -}} }, torch::k{{ input.dtype | capitalize }}),  // {{ input.name }}
{%- endfor %}
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
    routes=(Route("trace", upstream=MODULE, toolchain="torch", convert=convert),),
    load=load,
    snippets=_SNIPPETS,
)
