"""ExecuTorch: a program for phones and microcontrollers, with XNNPACK for the CPU.

https://docs.pytorch.org/executorch/stable/

Operators that XNNPACK does not support run with ExecuTorch's portable kernels, in the same file; if its partitioner
fails on a program, all of them do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from polyexport.format import Format, OnDevice, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, Precision, Runner
from polyexport.tracing.exported_program import load_program
from polyexport.tracing.looped import looped

if TYPE_CHECKING:
    import torch

UNROLLED = 16
"""Longest sequence whose recurrent layers are unrolled.

Longer ones run in a loop, with portable kernels; its lowering takes the same time for any length. At 16 steps a loop
is faster at a batch of 1, and slower at a batch of 16.
"""


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with XNNPACK's kernels where possible."""
    lower(load_program(source).module(), target, spec)


def convert_portable(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with ExecuTorch's portable kernels only."""
    lower(load_program(source).module(), target, spec, [])


def lower(module: torch.fx.GraphModule, target: Path, spec: ExportSpec, partitioners: list[Any] | None = None) -> None:
    """Write the program of a module, with the kernels that `partitioners` choose; by default XNNPACK's."""
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # its check of data types takes the first of several results for their list and asks for its length, which makes a
    # dynamic batch static
    config = EdgeCompileConfig(_check_ir_validity=False)
    _decompose_attention(module)
    looped(module, UNROLLED)
    # copies in the layout that a tensor has: XNNPACK refuses a part of a program that returns what it was given
    passes = [RemoveCloneOpsTransform(preserve_input_output_copies=True, eliminate_quant_dequant_pairs=False)]
    chosen = [XnnpackPartitioner()] if partitioners is None else partitioners
    program = exported(module, spec)
    with _quickly(program), _loops_of_any_batch():
        edge = to_edge_transform_and_lower(program, passes, partitioner=chosen, compile_config=config)
        target.write_bytes(edge.to_executorch().buffer)


@contextlib.contextmanager
def _quickly(program: torch.export.ExportedProgram) -> Iterator[None]:
    """Lower a program without work that changes nothing, which is half of the time for a small model.

    XNNPACK's passes find attention and bilinear resizing by the graphs that they decompose into, and export those each
    time. Each pass copies the record of where a node came from, which no pass changes.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
    from torch.fx.traceback import NodeSource

    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(NodeSource, "__deepcopy__", lambda self, memo: self, create=True))
        if not any("upsample" in name for name in called):
            stack.enter_context(mock.patch.object(bilinear_2d, "get_graphs_dict", dict))
        if not any("softmax" in name or "attention" in name for name in called):
            stack.enter_context(mock.patch.object(sdpa, "get_graphs", list))
        yield


@contextlib.contextmanager
def _loops_of_any_batch() -> Iterator[None]:
    """Emit a loop whose states and outputs have the sizes of the call, not those that memory is planned for.

    ExecuTorch's own copies into a state without resizing it, and resizes the outputs along the first axis only. The
    last sequence that a loop of ours is over has the shape of its outputs.
    """
    from executorch.exir.emit._emitter import _Emitter
    from executorch.exir.schema import Bool, EValue, Instruction, KernelCall

    emit = _Emitter._emit_scan

    def resizing(self: Any, args: Any, results: Any) -> Any:
        _, states, sequences, _ = args
        copy, _ = self._get_operator(name="aten::copy", overload="out")
        without_resizing, _ = self._get_operator(name="aten::copy_")
        not_blocking = self._emit_evalue(EValue(Bool(False))).id

        def into(target: int, source: int) -> list[int]:
            return [source, source, not_blocking, target, target]

        for result in results[len(states) :]:
            self.chain.instructions.append(Instruction(KernelCall(copy, into(result.id, sequences[-1].id))))
        begin = len(self.chain.instructions)
        made = emit(self, args, results)
        for call in (each.instr_args for each in self.chain.instructions[begin:]):
            if isinstance(call, KernelCall) and call.op_index == without_resizing:
                call.op_index, call.args = copy, into(*call.args[:2])
        return made

    with mock.patch.object(_Emitter, "_emit_scan", resizing):
        yield


def _decompose_attention(module: torch.fx.GraphModule) -> None:
    """Compose attention of matrix products and a softmax, in place; with a mask it keeps PyTorch's composition.

    PyTorch's own looks for rows without any key, by operations that XNNPACK lacks, where there is no mask either.
    """
    import torch

    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        traced = node.meta.get("val")
        by_position = traced is not None and traced.dim() == 4 and traced.transpose(1, 2).is_contiguous()
        node.target = _attention_by_position if by_position else _attention
    module.recompile()


def _attention_by_position(*args: Any, **kwargs: Any) -> torch.Tensor:
    """With the heads of a position side by side in memory, as PyTorch's kernel has them: views of that were traced.

    A copy whatever the traced layout is: what the kernel is decomposed into has another one.
    """
    import torch

    found = _attention(*args, **kwargs).transpose(1, 2)
    return found.clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    import torch

    heads = query.shape[:-2]
    if attn_mask is not None or is_causal or dropout_p or heads != key.shape[:-2] or heads != value.shape[:-2]:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # products of three axes: of more, each operand would be copied as a whole
    one, other, third = (x.reshape(-1, *x.shape[-2:]) for x in (query * factor, key, value))
    shares = torch.bmm(one, other.transpose(1, 2)).softmax(-1)
    return torch.bmm(shares, third).reshape(*query.shape[:-1], value.shape[-1])


def exported(module: torch.nn.Module, spec: ExportSpec) -> torch.export.ExportedProgram:
    """The program of a module, with an upper bound for each dynamic axis."""
    import torch

    bounds = spec.upper_bounds(64)  # memory is planned for the upper bounds
    free = {called: torch.export.Dim(called, min=1, max=most) for called, most in bounds.items()}
    shapes = tuple({axis: free[called] for axis, called in tensor.dynamic.items()} for tensor in spec.inputs)
    inputs = tuple(
        torch.zeros(tensor.sized(lambda called: max(2, spec.sizes[called])), dtype=getattr(torch, tensor.dtype))
        for tensor in spec.inputs
    )
    return torch.export.export(module, inputs, dynamic_shapes=shapes if spec.is_dynamic else None, strict=False)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it with ExecuTorch's runtime, whose threads all programs of a process share."""
    import torch
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    if _threadpool_get_thread_count() != threads:  # by itself it has one for each core
        _unsafe_reset_threadpool(threads)  # while no program runs
    program = Runtime.get().load_program(path)
    try:
        method = program.load_method("forward")
    except RuntimeError as error:  # the runtime reports only an error code
        if lacking := _lacking(path):
            raise RuntimeError(f"ExecuTorch's runtime has no kernel for {', '.join(lacking)}") from error
        raise

    def run(inputs: Arrays) -> Arrays:
        answers = method.execute([torch.from_numpy(np.asarray(inputs[name], order="C")) for name in spec.input_names])
        return {name: answer.numpy() for name, answer in zip(spec.output_names, answers, strict=True)}

    return run


def _lacking(path: Path) -> list[str]:
    """The operators of a file that the runtime lacks."""
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
    {{- {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "float64": "Double", "int64": "Long",
         "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}[input.dtype] }});
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
batch = np.load("{{ batch }}")
inputs = [torch.from_numpy(batch[name]) for name in {{ names | tojson }}]
outputs = program.load_method("forward").execute(inputs)
""",
    ),
)


def executorch_format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    """A format whose artifact is such a program."""
    defaults: dict[str, Any] = {"slow_because": "a step of a recurrent layer is many small operators"}
    return Format(
        name=name,
        aliases=(name.replace("executorch", "pte"),),
        description=description,
        url="https://docs.pytorch.org/executorch/stable/",
        artifact="model.pte",
        graph="model.pte",
        precision=precision,
        routes=routes,
        targets=("phone", "microcontroller"),
        snippets=_SNIPPETS,
        on_device=OnDevice(("executorch",), load=load),
        **(defaults | more),
    )


FORMAT = executorch_format(
    "executorch",
    "float32",
    "ExecuTorch program with XNNPACK, for phones and small devices",
    Route("xnnpack", "pt2", "executorch", convert),
    Route("portable", "pt2", "executorch", convert_portable),
    load=load,
)
