"""Shapes: tensors made by size, views of another size, permuted and padded axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from polyexport.tracing.decompositions.names import by_name

if TYPE_CHECKING:
    import torch


def functions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's functions, and their replacements with the same signatures."""
    import torch

    return {
        torch.eye: eye,
        torch.linspace: linspace,
        **by_name(movedim),
        torch.nn.functional.pad: pad,
        **{made: _of_long_sizes(made, 0, None) for made in (torch.zeros, torch.ones, torch.empty, torch.rand)},
        torch.full: _of_long_sizes(torch.full, 0, 1),
        torch.Tensor.new_full: _of_long_sizes(torch.Tensor.new_full, 1, 2),
        **{
            method: _of_long_sizes(method, 1, None)
            for method in (
                torch.Tensor.new_zeros,
                torch.Tensor.new_ones,
                torch.Tensor.new_empty,
                torch.Tensor.view,
                torch.Tensor.reshape,
                torch.Tensor.expand,
                torch.Tensor.repeat,
            )
        },
    }


def eye(n: Any, m: Any = None, *, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
    """`torch.eye` of a dynamic size by a comparison of indices."""
    import torch

    if all(type(size) is int for size in (n, n if m is None else m)):
        return torch.eye(n, n if m is None else m, dtype=dtype, **more)
    rows, columns = torch.arange(n), torch.arange(n if m is None else m)
    return (rows.unsqueeze(1) == columns).to(dtype or torch.get_default_dtype())


def linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
    """`torch.linspace` of a dynamic size, which `torch.export` makes a constant, as multiples of the distance."""
    import torch

    if type(steps) is int:
        return torch.linspace(start, end, steps, dtype=dtype, **more)
    greatest: Callable[..., Any] = torch.sym_max
    last = greatest(steps - 1, 1) if isinstance(steps, torch.SymInt) else (steps - 1).clamp(min=1)
    multiples = torch.arange(steps, dtype=dtype or torch.get_default_dtype())
    return torch.add(multiples * ((end - start) / last), start)


def movedim(x: torch.Tensor, source: Any, destination: Any) -> torch.Tensor:
    """`torch.movedim` as a permutation, which every converter supports."""
    pairs = zip(*([each] if isinstance(each, int) else each for each in (source, destination)), strict=True)
    placed = {to % x.dim(): from_ % x.dim() for from_, to in pairs}
    rest = iter([axis for axis in range(x.dim()) if axis not in placed.values()])
    return x.permute([placed[axis] if axis in placed else next(rest) for axis in range(x.dim())])


def pad(x: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """`torch.nn.functional.pad` in circular mode by concatenating slices; few converters support that mode."""
    import torch

    if mode != "circular" or any(not isinstance(size, int) or size < 0 for size in pad):
        return torch.nn.functional.pad(x, pad, mode, value)
    for pair in range(len(pad) // 2):
        axis, before, after = x.dim() - 1 - pair, pad[2 * pair], pad[2 * pair + 1]
        ends = (x.narrow(axis, x.shape[axis] - before, before), x, x.narrow(axis, 0, after))
        x = torch.cat([part for part, size in zip(ends, (before, 1, after), strict=True) if size], axis)
    return x


def _of_long_sizes(function: Callable[..., Any], first: int, last: int | None) -> Callable[..., Any]:
    """A function with its sizes, the arguments from `first` to `last`, as int64: ONNX needs one type to join them."""

    def long(size: Any) -> Any:
        import torch

        if isinstance(size, list | tuple):
            return type(size)(map(long, size)) if type(size) in (list, tuple) else size
        number = isinstance(size, torch.Tensor) and size.dim() == 0 and not size.is_floating_point()
        return size.to(torch.int64) if number else size

    def apply(*args: Any, **kwargs: Any) -> Any:
        sizes = tuple(map(long, args[first:last]))
        rest = () if last is None else args[last:]
        return function(*args[:first], *sizes, *rest, **kwargs)

    return apply
