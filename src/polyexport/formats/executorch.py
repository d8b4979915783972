"""ExecuTorch: a program for phones and microcontrollers, with XNNPACK for the CPU, in float32, int8 and 4 bits.

https://docs.pytorch.org/executorch/stable/

Operators that XNNPACK does not support run with ExecuTorch's portable kernels, in the same file; if its partitioner
fails on a program, all of them do. int8 is torchao's quantization of the exported program with XNNPACK's quantizer,
since XNNPACK has the kernels; so are weights in 4 bits, which it has kernels for in linear layers.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.format import Convert, Format, Load, Loaded, OnDevice, Route, Snippet
from polyexport.measure.weights import in_float, is_weight
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, calibration
from polyexport.tracing.exported_program import load_program
from polyexport.tracing.fake_quantization import with_trained_scales

if TYPE_CHECKING:
    import torch


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with XNNPACK's kernels where possible."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    _lower(load_program(source).module(), target, spec, [XnnpackPartitioner()])


def convert_portable(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with ExecuTorch's portable kernels only."""
    _lower(load_program(source).module(), target, spec, [])


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with weights and activations in int8."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    _lower(_calibrated(_layers(source), spec, dynamic=False), target, spec, [XnnpackPartitioner()])


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `quantize`, with the scales of the fake quantization that the model was trained with."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    _lower(with_trained_scales(source, spec).module(), target, spec, [XnnpackPartitioner()])


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with weights in int8; XNNPACK quantizes activations at run time."""
    _lower_weights(_layers(source), target, spec)


def store_in_4_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `quantize_weights`, with the weights of linear layers in 4 bits."""
    _lower_weights(_in_4_bits(_layers(source)), target, spec)


def _layers(source: Path) -> torch.fx.GraphModule:
    """The program's module with linear layers in place of other products with a weight, such as GPT-2's.

    XNNPACK's quantizer knows linear layers only, whose weights are the other way round.
    """
    import torch

    module = load_program(source).module()
    weights = dict(module.named_parameters())
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
        bias, x, weight = node.args
        if node.kwargs or weight.target not in weights or bias.target not in weights:
            continue
        name = f"{node.name}_weight"
        module.register_parameter(name, torch.nn.Parameter(weights[weight.target].detach().T.contiguous()))
        with module.graph.inserting_before(node):
            turned = module.graph.get_attr(name)
        node.target, node.args = torch.ops.aten.linear.default, (x, turned, bias)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _in_4_bits(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with the weights of linear layers in 4 bits, where XNNPACK has the kernel.

    Raises:
        RuntimeError: it has no such layers.
    """
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int4 = torch.int4  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(_GROUP))
    weights = _in_groups(module)
    if not weights:
        raise RuntimeError(
            f"XNNPACK supports 4 bits for linear layers whose number of inputs is divisible by {_GROUP}, and the model "
            "has none; use executorch-w8"
        )
    for weight in weights:
        path = str(weight.target)
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(module.get_parameter(path).detach())
        quantize_(layer, config)
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, layer.weight)
        for node in weight.users:
            node.target = torch.nn.functional.linear  # torchao's weights do not know the operator beneath it
    module.recompile()
    return module


_GROUP = 32
"""Weights per scale, along what a layer reads."""


def _in_groups(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The weights that only linear layers read, and whose rows are whole groups."""
    import torch

    linear, parameters = torch.ops.aten.linear.default, dict(module.named_parameters())
    return [
        node
        for node in module.graph.find_nodes(op="get_attr")
        if node.target in parameters
        and parameters[node.target].shape[-1] % _GROUP == 0
        and all(user.target is linear and node is user.args[1] for user in node.users)
    ]


def _lower_weights(module: torch.fx.GraphModule, target: Path, spec: ExportSpec) -> None:
    """Lower a module with the weights in int8 that are not in fewer bits.

    Each convolution is a delegate of its own: together with what comes before it, its input's axes are reordered for
    all that read the input.
    """
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    alone, rest = (
        XnnpackPartitioner([ConvolutionConfig], ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True),
        XnnpackPartitioner(),
    )
    alone.ops_to_not_decompose = rest.ops_to_not_decompose  # else operators are decomposed before the rest sees them
    _lower(_calibrated(module, spec, dynamic=True), target, spec, [alone, rest])


def _calibrated(module: torch.fx.GraphModule, spec: ExportSpec, *, dynamic: bool) -> torch.fx.GraphModule:
    """The module with operators in int8 where XNNPACK has int8 kernels.

    Raises:
        RuntimeError: it has no such operators.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program = _exported(module, spec).module()
    _keep_integers(program)
    _keep_quantized(program)
    _keep_residuals(program)
    if dynamic:
        _copy_convolutions(program)
    observed = prepare_pt2e(program, XNNPACKQuantizer().set_global(_rules(dynamic=dynamic)))
    for arrays in calibration(spec):
        observed(*(torch.from_numpy(arrays[name]) for name in spec.input_names))
    quantized: torch.fx.GraphModule = convert_pt2e(observed)
    _remove_copies(quantized)
    if not any("quantize" in str(node.target) for node in quantized.graph.nodes):
        raise RuntimeError(
            "XNNPACK supports int8 for products, convolutions and sums, and the model has none; use executorch"
        )
    return quantized


def _rules(*, dynamic: bool) -> Any:
    """XNNPACK's rules, with PyTorch's own least scale.

    The one that they come with, 1 / 4096, is more than the scale of weights below 0.03 and of activations within 0.06.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

    def refined(tensor: Any) -> Any:
        if tensor is None or tensor.is_dynamic:
            return tensor
        observer = tensor.observer_or_fake_quant_ctr.p.func.with_args(eps=torch.finfo(torch.float32).eps)
        return replace(tensor, observer_or_fake_quant_ctr=observer)

    rules = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    return replace(
        rules,
        input_activation=refined(rules.input_activation),
        output_activation=refined(rules.output_activation),
        weight=refined(rules.weight),
    )


def _keep_integers(module: torch.fx.GraphModule) -> None:
    """Exclude what computes in integers from quantization.

    The quantizer stores the constants of sums and products in float32, so indices become float32, and it takes a
    concatenation of integers for one of activations.
    """
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    with_constant = {torch.ops.aten.add.Tensor: torch.ops.aten.add.Scalar}
    with_constant[torch.ops.aten.mul.Tensor] = torch.ops.aten.mul.Scalar
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
        if node.target in with_constant and len(node.all_input_nodes) == 1:
            node.target = with_constant[node.target]
    module.recompile()


def _keep_quantized(module: torch.fx.GraphModule) -> None:
    """Exclude linear layers whose weights are quantized already."""
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.args[1].op == "call_function":
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _keep_residuals(module: torch.fx.GraphModule) -> None:
    """Exclude sums and concatenations that a layer norm reads: the residual path of a transformer.

    XNNPACK computes layer norms in float: int8 would only add errors, each block to those of the blocks before.
    """
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    aten = torch.ops.aten
    computed = {aten.add.Tensor, aten.add_.Tensor, aten.cat.default}
    passed = {*computed, aten.dropout.default, aten.slice.Tensor}
    read: set[torch.fx.Node] = set()
    for node in reversed(module.graph.nodes):
        is_read = (user.target is aten.layer_norm.default or user in read for user in node.users)
        if node.target in passed and any(is_read):
            read.add(node)
            if node.target in computed:
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _copy_convolutions(module: torch.fx.GraphModule) -> None:
    """Copy what each convolution returns before anything reads it.

    The quantizer leaves a convolution to its pattern of convolution and ReLU if a ReLU is all that reads it, and has no
    such pattern for ranges at run time: the convolution would stay in float.
    """
    import torch

    for node in [node for node in module.graph.nodes if str(node.target).startswith("aten.conv")]:
        with module.graph.inserting_after(node):
            copy = module.graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    module.recompile()


def _remove_copies(module: torch.fx.GraphModule) -> None:
    import torch

    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()


def _lower(module: torch.fx.GraphModule, target: Path, spec: ExportSpec, partitioners: list[Any]) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # its check of data types takes the first of several results for their list and asks for its length, which makes a
    # dynamic batch static
    config = EdgeCompileConfig(_check_ir_validity=False)
    _copy_attention(module)
    edge = to_edge_transform_and_lower(_exported(module, spec), partitioner=partitioners, compile_config=config)
    target.write_bytes(edge.to_executorch().buffer)


def _copy_attention(module: torch.fx.GraphModule) -> None:
    """Copy what attention returns, in the layout in memory that it was traced with.

    PyTorch's kernel has the heads of a position side by side, and what follows was traced as views of that; ExecuTorch
    decomposes it into operations that return another layout, which has no such views.
    """
    import torch

    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        traced = node.meta.get("val")
        if traced is None or traced.dim() != 4 or not traced.transpose(1, 2).is_contiguous():
            continue
        readers = list(node.users)
        with module.graph.inserting_after(node):
            by_position = module.graph.call_function(aten.transpose.int, (node, 1, 2))
        with module.graph.inserting_after(by_position):
            copy = module.graph.call_function(
                aten.clone.default, (by_position,), {"memory_format": torch.contiguous_format}
            )
        with module.graph.inserting_after(copy):
            by_head = module.graph.call_function(aten.transpose.int, (copy, 1, 2))
        for reader in readers:
            reader.replace_input_with(node, by_head)
    module.recompile()


def _exported(module: torch.nn.Module, spec: ExportSpec) -> torch.export.ExportedProgram:
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
    """Run it with ExecuTorch's runtime; it sets its number of threads itself."""
    import torch
    from executorch.runtime import Runtime

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


def load_quantized(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with ExecuTorch's runtime, with a remark on weights in float, and on those in 4 bits."""
    sizes: Counter[str] = Counter()
    for kind, size in _weights(path):
        sizes[_BITS.get(kind, "float")] += size
    total = sizes.total()
    four, eight = (f"{sizes[bits] / max(1, total):.0%} of its weights in {bits} bits" for bits in ("4", "8"))
    in_bits = f"{four}, {eight}" if sizes["4"] else ""
    left = in_float(sizes["float"], total, "which XNNPACK does not quantize", in_bits)
    few = in_bits if sizes["4"] < total / 2 else ""
    return Loaded(load(path, spec, threads=threads), remark=left.remark, shortfall=left.shortfall or few)


_BITS = {"qint8": "8", "qcint8": "8", "qcint4": "4", "qbint4": "4"}
"""Bits of XNNPACK's types of weights."""


def _weights(path: Path) -> list[tuple[str, int]]:
    """XNNPACK's type and the size of each weight; those outside of XNNPACK are float, as its portable kernels take."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(path.read_bytes()).program
    (plan,) = program.execution_plan
    tensors = [value.val for value in plan.values if type(value.val).__name__ == "Tensor"]
    found = [("fp32", tensor.sizes) for tensor in tensors if tensor.data_buffer_idx and not tensor.allocation_info]
    for delegate in plan.delegates:
        found += _of_xnnpack(program.backend_delegate_data[delegate.processed.index].data)
    return [(kind, math.prod(sizes)) for kind, sizes in found if is_weight(sizes)]


def _of_xnnpack(data: bytes) -> Iterator[tuple[str, list[int]]]:
    """The type and the sizes of each constant of a part that XNNPACK runs."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    graph = data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as folder, resources.path(serialization, "schema.fbs") as schema:
        Path(folder, "graph.bin").write_bytes(graph)
        _flatc_decompile(folder, str(schema), str(Path(folder, "graph.bin")))
        text = Path(folder, "graph.json").read_text(encoding="utf-8")
    for value in json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))["xvalues"]:
        tensor = value["xvalue_union"].get("tensor_value", value["xvalue_union"])
        if tensor.get("constant_buffer_idx"):
            yield tensor["datatype"].removeprefix("xnn_datatype_"), tensor["dims"]


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


def _format(
    name: str,
    precision: Precision,
    description: str,
    *ways: tuple[str, Convert],
    opens: Load = load_quantized,
    **more: Any,
) -> Format:
    return Format(
        name=name,
        aliases=(name.replace("executorch", "pte"),),
        description=description,
        url="https://docs.pytorch.org/executorch/stable/",
        artifact="model.pte",
        graph="model.pte",
        precision=precision,
        routes=tuple(Route(way, "pt2", "executorch", convert, trained=way == _TRAINED) for way, convert in ways),
        load=opens,
        targets=("phone", "microcontroller"),
        snippets=_SNIPPETS,
        on_device=OnDevice(("executorch",), load=load),
        **more,
    )


_TRAINED = "trained scales"

FORMATS = (
    _format(
        "executorch",
        "float32",
        "ExecuTorch program with XNNPACK, for phones and small devices",
        ("xnnpack", convert),
        ("portable", convert_portable),
        opens=load,
    ),
    _format(
        "executorch-w8",
        "w8",
        "ExecuTorch program with int8 weights, for phones' CPUs",
        ("xnnpack", quantize_weights),
    ),
    _format(
        "executorch-w4",
        "w4",
        "ExecuTorch program with its linear layers' weights in 4 bits, for language models on phones' CPUs",
        ("xnnpack", store_in_4_bits),
    ),
    _format(
        "executorch-int8",
        "int8",
        "ExecuTorch program in int8, calibrated with validation batches, for phones' CPUs",
        (_TRAINED, keep_trained_scales),
        ("xnnpack", quantize),
        calibrated=True,
    ),
)
