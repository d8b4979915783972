"""Operators composed of those that tools for networks of images have, such as batch norms of four axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def with_image_operators(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module with functions in place of operators that such tools lack; changes it in place.

    Traced again, they are batch norms of images, layer norms, pooling with windows of one size, and `exp`.
    """
    import torch

    aten = torch.ops.aten
    functions: dict[Any, Callable[..., Any]] = {
        aten.batch_norm.default: _batch_norm,
        aten.group_norm.default: _group_norm,
        aten.elu.default: _elu,
        aten.softplus.default: _softplus,
        aten.avg_pool1d.default: _avg_pool1d,
        aten.max_pool1d.default: _max_pool1d,
        aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    }
    for node in list(module.graph.nodes):
        if node.target is aten._native_batch_norm_legit_no_training.default:
            _return_first(node, _batch_norm, (*node.args[:5], False, *node.args[5:], False))
        elif node.op == "call_function":
            node.target = functions.get(node.target, node.target)
    module.recompile()
    return module


def _return_first(node: torch.fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Let a node call a function that returns the first of the results alone, which is all that is read of them."""
    for user in list(node.users):
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
    node.target, node.args = function, args


def _batch_norm(x: torch.Tensor, *settings: Any) -> torch.Tensor:
    import torch

    image = x if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], 1, -1)
    found: torch.Tensor = torch.ops.aten.batch_norm.default(image, *settings)
    return found.reshape(x.shape)


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *options: Any,
) -> torch.Tensor:
    """As a layer norm of each group, and a factor and an offset for each channel."""
    import torch

    grouped = x.reshape(x.shape[0], 1, groups, -1)
    found = torch.nn.functional.layer_norm(grouped, grouped.shape[-1:], eps=eps).reshape(x.shape)
    channels = (1, -1, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(channels)
    return found if bias is None else found + bias.reshape(channels)


def _elu(x: torch.Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> torch.Tensor:
    negative = (-(-x * input_scale).relu()).exp() - 1
    return scale * (x.relu() + alpha * negative)


def _softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """As a ReLU and `log(1 + z)` where `z` is at most 1, within 0.00014, which is below the resolution of int8.

    That is `2 artanh(u)` with `u = z / (2 + z)`, by the first terms of its series.
    """
    positive, negative = x.relu(), (-x).relu()
    z = (-beta * (positive + negative)).exp()
    u = z / (z + 2)
    square = u * u
    return positive + u * (2 + square * (2 / 3 + square * (2 / 5))) / beta


def _avg_pool1d(
    x: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    import torch

    sizes = ((1, *window), (1, *(stride or window)), (0, *padding))
    return torch.nn.functional.avg_pool2d(x.unsqueeze(-2), *sizes, ceil_mode, count_include_pad).squeeze(-2)


def _max_pool1d(
    x: torch.Tensor,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> torch.Tensor:
    import torch

    sizes = ((1, *window), (1, *(stride or window)), (0, *padding), (1, *dilation))
    found: torch.Tensor = torch.nn.functional.max_pool2d(x.unsqueeze(-2), *sizes, ceil_mode).squeeze(-2)
    return found


def _adaptive_avg_pool1d(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(x.unsqueeze(-2), (1, size[0])).squeeze(-2)
