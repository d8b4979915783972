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
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.format import Loaded, Route, trained_routes
from polyexport.formats.executorch import executorch_format, exported, load, lower
from polyexport.measure.drafts import Draft, distance, partly
from polyexport.measure.ranges import Step, too_narrow
from polyexport.measure.weights import in_float, in_four_bits, is_weight
from polyexport.spec import Arrays, ExportSpec, calibration
from polyexport.tracing.exported_program import load_program
from polyexport.tracing.in_place import functional
from polyexport.tracing.missing_scales import module_with_all_scales
from polyexport.tracing.products import as_products
from polyexport.tracing.unrolled import SUFFIX, is_unrolled, unrolled

if TYPE_CHECKING:
    import torch

# --- conversion -------------------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with weights and activations in int8."""
    module = _with_tables(_products(source, flat=False))
    lower(calibrated(module, spec, dynamic=False), target, spec)


def keep_trained_scales(source: Path, target: Path, spec: ExportSpec, *, calibrated: bool = False) -> None:
    """Like `quantize`, with the scales of the fake quantization that the model was trained with.

    Args:
        source: The program.
        target: The file.
        spec: Its signature, with batches to calibrate with.
        calibrated: Whether scales that training left out are calibrated.
    """
    lower(module_with_all_scales(source, spec, calibrated=calibrated), target, spec)


def quantize_weights(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the program with weights in int8; XNNPACK quantizes activations at run time."""
    _lower_weights(_with_tables(_products(source)), target, spec)


def _products(source: Path, **settings: bool) -> torch.fx.GraphModule:
    """The module of a program, in terms of linear layers as far as possible; `settings` are those of `as_products`."""
    return unrolled(as_products(load_program(source), **settings))


def store_in_4_bits(source: Path, target: Path, spec: ExportSpec, *, convolutions: bool = False) -> None:
    """Like `quantize_weights`, with the weights of linear layers and embeddings in 4 bits.

    Args:
        source: The program.
        target: The file.
        spec: Its signature.
        convolutions: Whether convolutions are computed as linear layers too, over all values that a position reads.

    Raises:
        RuntimeError: there are no such weights.
    """
    module = _products(source, convolutions=convolutions)
    names = _possibly_in_4_bits(module)
    if not names:
        raise RuntimeError(
            "XNNPACK supports 4 bits for linear layers, and the model has neither such nor embeddings; use "
            "executorch-w8"
        )
    _store(module, target, spec, names)


def store_some_in_4_bits(source: Path, target: Path, spec: ExportSpec) -> None:
    """Store the cheapest weights in 4 bits, at least half of them, and the costliest in int8."""
    import torch

    module = _products(source, convolutions=True)
    weights = {name: weight.detach() for name, weight in module.named_parameters() if is_weight(weight.shape)}
    sizes = {name: weights[name].numel() for name in _possibly_in_4_bits(module)}
    batches = [tuple(torch.from_numpy(arrays[name]) for name in spec.input_names) for arrays in calibration(spec)]

    def answers(names: Collection[str]) -> list[Arrays]:
        rounded = {name: _rounded(weights[name]) for name in names}
        found = (torch.func.functional_call(module, rounded, batch) for batch in batches)
        return [
            {str(i): leaf.detach().numpy() for i, leaf in enumerate(torch.utils._pytree.tree_leaves(each))}
            for each in found
        ]

    expected, total = answers(()), sum(weight.numel() for weight in weights.values())
    chosen = partly(sizes, total, lambda names: Draft(names, "", distance(expected, answers(names))))
    _store(module, target, spec, chosen.model)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight in 4 bits, as float again."""
    groups = weight.reshape(-1, _GROUP if weight.shape[-1] % _GROUP == 0 else weight.shape[-1])
    scales = groups.abs().amax(1, keepdim=True).clamp_min(_LEAST) / 7.5
    return ((groups / scales).round().clamp(-8, 7) * scales).reshape(weight.shape)


_LEAST = 2.0**-126
"""The least positive normal number in float32."""


def _store(module: torch.fx.GraphModule, target: Path, spec: ExportSpec, in_4_bits: Collection[str]) -> None:
    """Lower the module with the weights of these names in 4 bits, and the others in int8."""
    layers = [name for name in _read_by_linear(module) if name in in_4_bits]
    module = _with_tables(module, in_4_bits)
    in_groups = [name for name in layers if module.get_parameter(name).shape[-1] % _GROUP == 0]
    _lower_weights(_in_groups(module, in_groups), target, spec, {*layers} - {*in_groups})


_GROUP = 32
"""Weights per scale, along what a layer reads, where that is divisible by it; else a row has one scale."""


def _possibly_in_4_bits(module: torch.fx.GraphModule) -> list[str]:
    """The names of the weights that are right in 4 bits; XNNPACK's kernel is not for an odd number of inputs."""
    even = (name for name in _read_by_linear(module) if module.get_parameter(name).shape[-1] % 2 == 0)
    return [*even, *_read_by_embeddings(module)]


def _read_by_linear(module: torch.fx.GraphModule) -> list[str]:
    """The names of the weights that only linear layers read, those in recurrent layers included."""
    import torch

    def is_read(weight: torch.fx.Node, reader: torch.fx.Node) -> bool:
        if reader.op == "call_module" and str(reader.target).endswith(SUFFIX):
            return is_weight(module.get_parameter(str(weight.target)).shape)
        return reader.target is torch.ops.aten.linear.default and weight is reader.args[1]

    return _read_by(module, is_read)


def _read_by_embeddings(module: torch.fx.GraphModule) -> list[str]:
    """The names of the weights in float32 that only embeddings read."""
    import torch

    embedding = torch.ops.aten.embedding.default
    return _read_by(module, lambda weight, reader: reader.target is embedding and weight is reader.args[0])


def _read_by(module: torch.fx.GraphModule, is_read: Callable[[torch.fx.Node, torch.fx.Node], bool]) -> list[str]:
    """The names of the parameters in float32 of which `is_read` holds with every node that reads them."""
    import torch

    parameters = dict(module.named_parameters())
    return [
        str(node.target)
        for node in module.graph.find_nodes(op="get_attr")
        if node.target in parameters
        and parameters[node.target].dtype == torch.float32
        and all(is_read(node, user) for user in node.users)
    ]


def _in_groups(module: torch.fx.GraphModule, names: Collection[str]) -> torch.fx.GraphModule:
    """The module with these weights of linear layers in 4 bits, with a scale for each group."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int4 = torch.int4  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(_GROUP))
    for weight in [node for node in module.graph.find_nodes(op="get_attr") if node.target in names]:
        path = str(weight.target)
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(module.get_parameter(path).detach())
        quantize_(layer, config)
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, layer.weight)
        for node in (user for user in weight.users if user.op == "call_function"):
            node.target = torch.nn.functional.linear  # torchao's weights do not know the operator beneath it
    module.recompile()
    return module


def _with_tables(module: torch.fx.GraphModule, in_4_bits: Collection[str] = ()) -> torch.fx.GraphModule:
    """The module with embeddings in 8 bits, or in 4 for these names, whose rows portable kernels read and scale."""
    import torch

    weights = dict(module.named_parameters())
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table: Any = node.args[0]
        if table.op == "get_attr" and table.target in weights and weights[table.target].dtype == torch.float32:
            name, bits = f"{node.name}_table", 4 if table.target in in_4_bits else 8
            module.add_submodule(name, _table(weights[table.target].detach(), bits))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(name, (node.args[1],)))
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _table(weight: torch.Tensor, bits: int) -> torch.nn.Module:
    """A module that reads rows of an embedding of shape (rows, width).

    A row has one scale in 8 bits, and one for each group of numbers in 4. In 4 bits a byte has two numbers, one of each
    half of a row.
    """
    import torch

    rows, width = weight.shape
    groups = width // _GROUP if bits == 4 and width % _GROUP == 0 else 1
    most = 7.5 if bits == 4 else 127.0  # the sixteen levels of 4 bits are symmetric, without 0
    scales = weight.reshape(rows, groups, -1).abs().amax(2).clamp_min(_LEAST) / most
    steps = weight / scales.repeat_interleave(width // groups, 1)
    numbers = steps.round().to(torch.int8)
    if bits == 4:
        numbers = torch.nn.functional.pad((steps + 7.5).round().clamp(0, 15).to(torch.uint8), (0, width % 2))
        low, high = numbers.chunk(2, 1)
        numbers = low | high << 4

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("numbers", numbers)
            self.register_buffer("scales", scales)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.nn.functional.embedding(ids, self.get_buffer("numbers"))
            scale = torch.nn.functional.embedding(ids, self.get_buffer("scales"))
            if bits == 4:
                found = torch.cat([found & 15, torch.bitwise_right_shift(found, 4)], -1)[..., :width].float() - 7.5
                found, scale = found.unflatten(-1, (groups, -1)), scale.unsqueeze(-1)
            rows: torch.Tensor = found.float() * scale
            return rows.flatten(-2) if bits == 4 else rows

    return Table()


def _lower_weights(
    module: torch.fx.GraphModule, target: Path, spec: ExportSpec, in_4_bits: Collection[str] = ()
) -> None:
    """Lower a module with the weights in int8 that are not in fewer bits, and those of the given names in 4.

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
    lower(calibrated(module, spec, dynamic=True, in_4_bits=in_4_bits), target, spec, [alone, rest])


def calibrated(
    module: torch.fx.GraphModule, spec: ExportSpec, *, dynamic: bool, in_4_bits: Collection[str] = ()
) -> torch.fx.GraphModule:
    """The module with operators in int8 where XNNPACK has int8 kernels.

    Args:
        module: The module in float32.
        spec: Its signature, with batches to calibrate with.
        dynamic: Whether activations are quantized at run time.
        in_4_bits: Names of linear layers' weights that are in 4 bits, with a scale for each row.

    Raises:
        RuntimeError: it has no such operators.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import ComposableQuantizer

    program = functional(exported(module, spec)).module()
    _keep_integers(program)
    _keep_quantized(program)
    _keep_residuals(program)
    _keep_states(program)
    _keep_volumes(program)
    if dynamic:
        _copy_convolutions(program)
    quantizer = XNNPACKQuantizer().set_global(_rules(dynamic=dynamic))
    if in_4_bits:
        rows = XNNPACKQuantizer().set_global(_rules(dynamic=dynamic, steps=7))
        rows.set_filter_function(lambda node: _weight_of(node) in in_4_bits)
        quantizer = ComposableQuantizer([rows, quantizer])
    observed = prepare_pt2e(program, quantizer)
    for arrays in calibration(spec):
        observed(*(torch.from_numpy(arrays[name]) for name in spec.input_names))
    _widen(observed)
    quantized: torch.fx.GraphModule = convert_pt2e(observed)
    _remove_copies(quantized)
    if not any("quantize" in str(node.target) for node in quantized.graph.nodes):
        raise RuntimeError(
            "XNNPACK supports int8 for products, sums, and convolutions over one or two axes, and the model has none; "
            "use executorch"
        )
    return quantized


def _widen(observed: torch.fx.GraphModule) -> None:
    """Let observers of tensors that are 0 in all batches see more, since XNNPACK refuses the scales of such ranges."""
    import torch

    aten = torch.ops.aten
    sums = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor}
    called: dict[Any, Any] = {
        node: observed.get_submodule(str(node.target)) for node in observed.graph.find_nodes(op="call_module")
    }
    seen = {
        node: each
        for node, each in called.items()
        if hasattr(each, "min_val") and each.min_val.numel() == 1 and node.args[0].op != "get_attr"
    }
    name_of = {node: node.args[0].name for node in seen}
    steps = [
        Step([name_of.get(each, each.name) for each in node.all_input_nodes], node.name, node.target in sums)
        for node in observed.graph.nodes
        if node.op == "call_function"
    ]
    ranges = {name_of[node]: (float(each.min_val), float(each.max_val)) for node, each in seen.items()}
    wider = too_narrow(ranges, steps)
    for node, each in seen.items():
        if name_of[node] in wider:
            each(torch.linspace(0.0, wider[name_of[node]], 256))


def _weight_of(node: torch.fx.Node) -> str:
    """The name of the weight that a linear layer reads; empty for any other operator."""
    import torch

    weight: Any = node.args[1] if node.target is torch.ops.aten.linear.default else None
    return "" if weight is None else str(weight.target)


def _rules(*, dynamic: bool, steps: int = 127) -> Any:
    """XNNPACK's rules for weights of so many positive steps, with PyTorch's own least scale.

    The one that they come with, 1 / 4096, is more than the scale of weights below 0.03 and of activations within 0.06.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

    def refined(tensor: Any) -> Any:
        if tensor is None or tensor.is_dynamic:
            return tensor
        observer = tensor.observer_or_fake_quant_ctr.p.func.with_args(eps=torch.finfo(torch.float32).eps)
        return replace(tensor, observer_or_fake_quant_ctr=observer)

    rules = get_symmetric_quantization_config(
        is_per_channel=True, is_dynamic=dynamic, weight_qmin=-steps - (steps < 127), weight_qmax=steps
    )
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
    passed = {*computed, aten.slice.Tensor}
    read: set[torch.fx.Node] = set()
    for node in reversed(module.graph.nodes):
        is_read = (user.target is aten.layer_norm.default or user in read for user in node.users)
        if node.target in passed and any(is_read):
            read.add(node)
            if node.target in computed:
                _exclude(node)


def _keep_states(module: torch.fx.GraphModule) -> None:
    """Exclude all but the linear layers of recurrent layers: errors of a state add up, each step to those before."""
    import torch

    for node in module.graph.nodes:
        if is_unrolled(node) and node.target is not torch.ops.aten.linear.default:
            _exclude(node)


def _keep_volumes(module: torch.fx.GraphModule) -> None:
    """Exclude convolutions over three axes: the quantizer takes them, and XNNPACK does not."""
    import torch

    aten = torch.ops.aten
    convolutions = (aten.conv3d.default, aten.conv_transpose3d.input, aten.convolution.default)
    for node in (node for node in module.graph.nodes if node.target in convolutions):
        if node.args[1].meta["val"].dim() == 5:
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
        copy.meta = {**node.meta, _COPY: True}
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    module.recompile()


_COPY = "copy of a convolution's result"
"""What the metadata of such a copy has, for `_remove_copies`."""


def _remove_copies(module: torch.fx.GraphModule) -> None:
    """Remove the copies that `_copy_convolutions` made."""
    for node in [node for node in module.graph.nodes if _COPY in node.meta]:
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

_TABLES = {"CHAR": ("qint8", 1), "BYTE": ("qcint4", 2)}
"""ExecuTorch's types of embeddings in integers: XNNPACK's names of them, and how many numbers are in a byte."""


def _weights(path: Path) -> list[tuple[str, int]]:
    """XNNPACK's type and the size of each weight; outside of XNNPACK all but embeddings are float.

    A weight that several parts read, such as the steps of a recurrent layer, is stored once, and counts once.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(path.read_bytes()).program
    (plan,) = program.execution_plan
    tensors = [value.val for value in plan.values if type(value.val).__name__ == "Tensor"]
    found: list[tuple[str, list[int]]] = []
    in_xnnpack: dict[str, tuple[str, list[int]]] = {}
    for tensor in (each for each in tensors if each.data_buffer_idx and not each.allocation_info):
        kind, packed = _TABLES.get(tensor.scalar_type.name, ("fp32", 1))
        found.append((kind, [*tensor.sizes[:-1], packed * tensor.sizes[-1]] if tensor.sizes else []))
    for delegate in plan.delegates:
        in_xnnpack |= _of_xnnpack(program.backend_delegate_data[delegate.processed.index].data)
    found += in_xnnpack.values()
    return [(kind, math.prod(sizes)) for kind, sizes in found if is_weight(sizes)]


def _of_xnnpack(data: bytes) -> dict[str, tuple[str, list[int]]]:
    """The type and the sizes of each constant of a part that XNNPACK runs, by the name that the program has it by."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    graph = data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as folder, resources.path(serialization, "schema.fbs") as schema:
        Path(folder, "graph.bin").write_bytes(graph)
        _flatc_decompile(folder, str(schema), str(Path(folder, "graph.bin")))
        text = Path(folder, "graph.json").read_text(encoding="utf-8")
    read = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))
    tensors = [value["xvalue_union"].get("tensor_value", value["xvalue_union"]) for value in read["xvalues"]]
    return {
        read["constant_data"][tensor["constant_buffer_idx"]]["named_key"]: (
            tensor["datatype"].removeprefix("xnn_datatype_"),
            tensor["dims"],
        )
        for tensor in tensors
        if tensor.get("constant_buffer_idx")
    }


FORMATS = (
    executorch_format(
        "executorch-w8",
        "w8",
        "ExecuTorch program with int8 weights, for phones' CPUs",
        Route("xnnpack", "pt2", "executorch", quantize_weights),
        load=load_quantized,
        slow_because="XNNPACK takes the ranges of activations at each call, and each convolution is a call of its own",
    ),
    executorch_format(
        "executorch-w4",
        "w4",
        "ExecuTorch program with weights in 4 bits, for language models on phones' CPUs",
        Route("xnnpack", "pt2", "executorch", store_in_4_bits),
        Route("convolutions too", "pt2", "executorch", partial(store_in_4_bits, convolutions=True)),
        Route("some in 8 bits", "pt2", "executorch", store_some_in_4_bits),
        load=load_quantized,
        calibrated=True,
    ),
    executorch_format(
        "executorch-int8",
        "int8",
        "ExecuTorch program in int8, calibrated with validation batches, for phones' CPUs",
        *trained_routes("executorch", keep_trained_scales),
        Route("xnnpack", "pt2", "executorch", quantize),
        load=load_quantized,
        calibrated=True,
        slow_because="what XNNPACK's quantizer leaves in float, as padding and clamping, converts numbers from int8 "
        "and back at each place",
    ),
)
