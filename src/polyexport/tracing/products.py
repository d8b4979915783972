"""Rewrites a program in terms of linear layers, for quantizers that know little else.

A kernel for low precision is a matrix product first, and often nothing more. A convolution is such a product with the
patches of its input, and a one-dimensional convolution is one in two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Decompositions = dict[Any, Callable[..., Any]]


def as_products(
    program: torch.export.ExportedProgram, *, flat: bool = True, convolutions: bool = False
) -> torch.fx.GraphModule:
    """The module of a program with linear layers for other products with a weight.

    Args:
        program: The program.
        flat: Whether one-dimensional convolutions become two-dimensional ones.
        convolutions: Whether convolutions without groups become linear layers too.
    """
    import torch

    aten = torch.ops.aten
    table: Decompositions = {aten.conv1d.default: _in_two_dimensions} if flat else {}
    if convolutions:
        table = {aten.conv1d.default: _product_of_rows, aten.conv2d.default: _product_of_patches}
    if not any(node.target in table for node in program.graph.nodes):
        return _with_linear_layers(program.module())
    module = _with_constants_folded(program.run_decompositions(table).module())
    return _with_linear_layers(_with_convolutions(module))


def _in_two_dimensions(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    *,
    convolve: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """A one-dimensional convolution as one over images of a single row; `convolve` is what computes that."""
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    settings = [1, *stride], [0, *padding], [1, *dilation], groups
    found = (convolve or _convolution)(batched.unsqueeze(2), weight.unsqueeze(2), bias, *settings).squeeze(2)
    return found if x.dim() == 3 else found.squeeze(0)


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    import torch

    settings = [*stride], [*padding], [*dilation], False, [0, 0], groups
    return torch.ops.aten.convolution.default(x, weight, bias, *settings)  # type: ignore[no-any-return]  # untyped


def _product_of_rows(x: torch.Tensor, weight: torch.Tensor, *settings: Any) -> torch.Tensor:
    return _in_two_dimensions(x, weight, *settings, convolve=_product_of_patches)


def _product_of_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """A two-dimensional convolution as a linear layer over the values that each of its positions reads."""
    import torch
    from torch.nn import functional

    stride, padding, dilation = ([*each] * (2 // len(each)) for each in (stride, padding, dilation))
    if groups > 1 or x.dim() != 4:
        return _convolution(x, weight, bias, stride, padding, dilation, groups)
    if any(padding):
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    sizes = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]

    def read(x: torch.Tensor, axis: int) -> list[torch.Tensor]:
        """What each element of the kernel reads along an axis."""
        i = axis - 2
        reach = (sizes[i] - 1) * stride[i] + 1
        starts = [step * dilation[i] for step in range(kernel[i])]
        return [torch.ops.aten.slice.Tensor(x, axis, begin, begin + reach, stride[i]) for begin in starts]

    rows = [_joined(read(row, 3)) for row in read(x, 2)]
    patches = _joined(rows).permute(0, 2, 3, 1)
    found = functional.linear(patches, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)
    return found.permute(0, 3, 1, 2)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat([*parts], 1)


def _with_constants_folded(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with reordered weights as weights of their own."""
    import torch

    aten = torch.ops.aten
    moves = {aten.permute.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.t.default}
    moves |= {aten.transpose.int, aten.clone.default, aten._unsafe_view.default, aten.select.int, aten.slice.Tensor}
    known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.target not in moves or not isinstance(source, torch.fx.Node) or source.target not in known:
            continue
        if source.op != "get_attr" or len(node.all_input_nodes) > 1:
            continue
        made = node.target(known[source.target].detach(), *node.args[1:], **node.kwargs).contiguous()
        name = f"{node.name}_folded"
        module.register_parameter(name, torch.nn.Parameter(made, requires_grad=False))
        known[name] = made
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _with_convolutions(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with the operator of two-dimensional convolutions, which quantizers know, for the general one."""
    import torch

    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.convolution.default):
        *settings, transposed, _, groups = node.args
        if not transposed and len(node.meta["val"].shape) == 4:
            node.target, node.args = aten.conv2d.default, (*settings, groups)
    module.recompile()
    return module


def _with_linear_layers(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with linear layers in place of other products with a weight, such as GPT-2's."""
    import torch

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
