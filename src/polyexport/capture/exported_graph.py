"""Graphs that `torch.export` made and that train on, as torchao's `prepare_qat_pt2e` returns them.

https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_qat.html

Such a module has no forward in Python but a graph of PyTorch's operators, in which training is an argument of batch
norms, dropouts, attention and recurrent layers: it refuses `eval()` and cannot be pickled. Here it is pickled node by
node, as it computes in eval mode, and becomes an ordinary `torch.fx.GraphModule` where it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from polyexport.tracing.dropouts import dropouts

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


@dataclass(frozen=True, slots=True)
class Operator:
    """One of PyTorch's operators, by its name: `aten.relu.default`."""

    name: str


@dataclass(frozen=True, slots=True)
class Earlier:
    """A node among another one's arguments, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Step:
    """A node of a graph: an `Operator`, or another target that fx has."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any


_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Attributes that a module keeps; the others are the graph's and of training."""


def is_exported(item: Any) -> bool:
    """Whether it is a module with a graph of PyTorch's operators, unlike one that fx traced, which has functions."""
    import torch

    if not isinstance(item, torch.fx.GraphModule):
        return False
    called = [node.target for node in item.graph.nodes if node.op == "call_function"]
    return any(isinstance(target, torch._ops.OpOverload) for target in called)


def reduced(module: GraphModule) -> tuple[Any, ...]:
    """How to pickle it, as `__reduce__` returns it: as it computes in eval mode."""
    import torch
    from torch.fx.node import map_aggregate

    removed = {operator.default for operator in dropouts()}
    names: dict[Node, str] = {}

    def as_earlier(argument: Any) -> Any:
        return Earlier(names[argument]) if isinstance(argument, torch.fx.Node) else argument

    steps, left_out = [], set(_of_training(module))
    for node in module.graph.nodes:
        if node in left_out:
            continue
        names[node] = names[node.args[0]] if node.target in removed else node.name
        if node.target not in removed:
            args, kwargs = map_aggregate(_in_eval_mode(node), as_earlier)
            steps.append(Step(node.op, node.name, _named(node.target), args, kwargs))
    own = {name: vars(module)[name] for name in _OWN}
    own["_modules"] = {name: part for name, part in own["_modules"].items() if name != _GUARDS}
    return _rebuilt, (own, tuple(steps), module.graph._codegen)


def _in_eval_mode(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, those that are for training as they are in eval mode."""
    import torch

    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, node.kwargs
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("running_mean", ...) is not None:  # a norm without running statistics is the same in eval mode
        given |= {name: _OFF[name] for name in given.keys() & _OFF}
    return tuple(given[name] for name in names[: len(node.args)]), {name: given[name] for name in node.kwargs}


_OFF: Mapping[str, Any] = {"train": False, "training": False, "use_input_stats": False, "dropout_p": 0.0}
"""Arguments of operators that are for training, as they are in eval mode."""


_GUARDS = "_guards_fn"
"""A submodule that compares inputs with the sizes that were traced, by generated code."""


def _of_training(module: GraphModule) -> Iterator[Node]:
    """Nodes without a result that are of no use in eval mode: counts of batches, and guards."""
    import torch

    for node in module.graph.nodes:
        counts = node.target is torch.ops.aten.add_.Tensor and node.args[0].op == "get_attr"
        if not node.users and (counts or node.target == _GUARDS):
            yield node


def _named(target: Any) -> Any:
    import torch

    return Operator(str(target)) if isinstance(target, torch._ops.OpOverload) else target


def _target(named: Any) -> Any:
    import torch

    return reduce(getattr, named.name.split("."), torch.ops) if isinstance(named, Operator) else named


def _rebuilt(own: dict[str, Any], steps: Iterable[Step], codegen: Any) -> GraphModule:
    """The module of these nodes, with these parameters, buffers and submodules."""
    import torch
    from torch.fx.node import map_aggregate

    root, graph, made = torch.nn.Module(), torch.fx.Graph(), {}
    vars(root).update(own)
    for step in steps:
        args, kwargs = map_aggregate(
            (step.args, step.kwargs), lambda each: made[each.name] if isinstance(each, Earlier) else each
        )
        made[step.name] = graph.create_node(step.op, _target(step.target), args, kwargs, step.name)
    graph.set_codegen(codegen)
    module = torch.fx.GraphModule(root, graph, "GraphModule")
    vars(module).update(own)  # with those that no node reads
    return module


def fold_batch_norms(module: GraphModule) -> None:
    """Fold each batch norm into the convolution before it whose weights are scaled for it and then rounded.

    `prepare_qat_pt2e` multiplies such weights by the norm's factor, and divides the result by it again, which leaves no
    integer convolution: `norm(conv(x, w * factor) / factor + bias)` is `conv(x, w * factor) + offset`.
    Changes `module` in place.
    """
    import torch

    aten, graph = torch.ops.aten, module.graph
    for norm in [node for node in graph.nodes if node.target is aten.batch_norm.default]:
        x, weight, beta, mean, *_ = norm.args
        bias = None
        if x.target is aten.add.Tensor:
            x, bias = x.args[0], _before_reshape(x.args[1])
        if x.target is not aten.div.Tensor or x.args[0].target not in _convolutions():
            continue
        conv, factor = x.args[0], _before_reshape(x.args[1])
        if factor.target is not aten.div.Tensor or factor.args[0] is not weight:
            continue
        with graph.inserting_before(norm):
            centered = mean if bias is None else graph.call_function(aten.sub.Tensor, (mean, bias))
            offset = graph.call_function(aten.mul.Tensor, (centered, factor))
            shift = graph.call_function(aten.sub.Tensor, (beta, offset))
            folded = graph.call_function(conv.target, (*conv.args[:2], shift, *conv.args[3:]), conv.kwargs)
        norm.replace_all_uses_with(folded)
    graph.eliminate_dead_code()
    module.recompile()


def _before_reshape(node: Node) -> Any:
    import torch

    return node.args[0] if node.target is torch.ops.aten.reshape.default else node


def _convolutions() -> set[Any]:
    import torch

    aten = torch.ops.aten
    return {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    }  # fmt: skip
