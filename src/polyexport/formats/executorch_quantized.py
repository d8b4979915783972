"""ExecuTorch in int8 and with weights in 8 and 4 bits, by torchao, where XNNPACK has the kernels.

https://docs.pytorch.org/executorch/stable/

int8 is torchao's quantization of the exported program with XNNPACK's quantizer; only linear layers have 4-bit weights.
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

from polyexport.format import Loaded, Route
from polyexport.formats.executorch import executorch_format, exported, load, lower
from polyexport.measure.weights import in_float, in_four_bits, is_weight
from polyexport.spec import ExportSpec, calibration
from polyexport.tracing.exported_program import load_program
from polyexport.tracing.fake_quantization import with_trained_scales

if TYPE_CHECKING:
    import torch

# --- conversion -------------------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with weights and activations in int8."""
    lower(calibrated(_layers(source), spec, dynamic=False), target, spec)


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec) -> None:
    """Like `quantize`, with the scales of the fake quantization that the model was trained with."""
    lower(with_trained_scales(source, spec).module(), target, spec)


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
        added, x, multiplied = node.args
        bias, weight = weights.get(added.target), weights.get(multiplied.target)
        if node.kwargs or bias is None or weight is None or not bias.shape[-1] == bias.numel() == weight.shape[1]:
            continue
        with module.graph.inserting_before(node):
            own = []
            for name, tensor in (("weight", weight.T), ("bias", bias.flatten())):
                module.register_parameter(f"{node.name}_{name}", torch.nn.Parameter(tensor.detach().contiguous()))
                own.append(module.graph.get_attr(f"{node.name}_{name}"))
        node.target, node.args = torch.ops.aten.linear.default, (x, *own)
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
    lower(calibrated(module, spec, dynamic=True), target, spec, [alone, rest])


def calibrated(module: torch.fx.GraphModule, spec: ExportSpec, *, dynamic: bool) -> torch.fx.GraphModule:
    """The module with operators in int8 where XNNPACK has int8 kernels.

    Raises:
        RuntimeError: it has no such operators.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program = exported(module, spec).module()
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


def _exclude(node: torch.fx.Node) -> None:
    """Exclude an operator from quantization: it is taken for one that a quantizer has looked at."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _keep_integers(module: torch.fx.GraphModule) -> None:
    """Exclude what computes in integers from quantization.

    The quantizer stores the constants of sums and products in float32, so indices become float32, and it takes a
    concatenation of integers for one of activations.
    """
    import torch

    with_constant = {torch.ops.aten.add.Tensor: torch.ops.aten.add.Scalar}
    with_constant[torch.ops.aten.mul.Tensor] = torch.ops.aten.mul.Scalar
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        _exclude(node)
        if node.target in with_constant and len(node.all_input_nodes) == 1:
            node.target = with_constant[node.target]
    module.recompile()


def _keep_quantized(module: torch.fx.GraphModule) -> None:
    """Exclude linear layers whose weights are quantized already."""
    import torch

    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.args[1].op == "call_function":
            _exclude(node)


def _keep_residuals(module: torch.fx.GraphModule) -> None:
    """Exclude sums and concatenations that a layer norm reads: the residual path of a transformer.

    XNNPACK computes layer norms in float: int8 would only add errors, each block to those of the blocks before.
    """
    import torch

    aten = torch.ops.aten
    computed = {aten.add.Tensor, aten.add_.Tensor, aten.cat.default}
    passed = {*computed, aten.dropout.default, aten.slice.Tensor}
    read: set[torch.fx.Node] = set()
    for node in reversed(module.graph.nodes):
        is_read = (user.target is aten.layer_norm.default or user in read for user in node.users)
        if node.target in passed and any(is_read):
            read.add(node)
            if node.target in computed:
                _exclude(node)


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


# --- running ----------------------------------------------------------------------------------------------------------


def load_quantized(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with ExecuTorch's runtime, with a remark on weights in float, and on those in 4 bits."""
    sizes: Counter[str] = Counter()
    for kind, size in _weights(path):
        sizes[_BITS.get(kind, "float")] += size
    why = "which XNNPACK does not quantize"
    left = in_float(sizes["float"], sizes.total(), why)
    if sizes["4"]:
        left = in_four_bits(sizes["4"], sizes["8"], sizes["float"], why)
    return Loaded(load(path, spec, threads=threads), remark=left.remark, shortfall=left.shortfall)


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


FORMATS = (
    executorch_format(
        "executorch-w8",
        "w8",
        "ExecuTorch program with int8 weights, for phones' CPUs",
        Route("xnnpack", "pt2", "executorch", quantize_weights),
        load=load_quantized,
    ),
    executorch_format(
        "executorch-w4",
        "w4",
        "ExecuTorch program with its linear layers' weights in 4 bits, for language models on phones' CPUs",
        Route("xnnpack", "pt2", "executorch", store_in_4_bits),
        load=load_quantized,
    ),
    executorch_format(
        "executorch-int8",
        "int8",
        "ExecuTorch program in int8, calibrated with validation batches, for phones' CPUs",
        Route("trained scales", "pt2", "executorch", keep_trained_scales, trained=True),
        Route("xnnpack", "pt2", "executorch", quantize),
        load=load_quantized,
        calibrated=True,
    ),
)
