"""Programs of `torch.export`: how they are traced, and how converters read them.

Requirements:
* A program is traced without autograd, and has no trace of it: with autograd on, `torch.export` refuses writes into a
  view, and records each change of the grad mode, which some versions of it cannot load again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyexport.errors import BadRequest, line
from polyexport.tracing import special_functions
from polyexport.tracing.forward import within
from polyexport.tracing.reads import named, site_of

if TYPE_CHECKING:
    import torch


def export_program(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], dynamic: Sequence[Iterable[int]]
) -> torch.export.ExportedProgram:
    """Trace `module` with the axes in `dynamic`, given for each input, dynamic.

    Raises:
        Exception: whatever `torch.export` raises, also if the trace makes an axis static that should be dynamic.
    """
    import torch

    free = torch.export.Dim.DYNAMIC  # not AUTO: an axis that becomes static must be an error here
    shapes = tuple(dict.fromkeys(axes, free) for axes in dynamic)
    copies = tuple(tensor.clone() for tensor in inputs)  # tracing marks the inputs with their dynamic axes for good
    with torch.no_grad(), _grad_mode_left_alone(module):
        try:
            return torch.export.export(module, copies, dynamic_shapes=shapes or None, strict=False)
        except BadRequest:  # which says what to do already
            raise
        except Exception as error:
            if scripted := _scripted(module):
                raise RuntimeError(
                    f"torch.export cannot export parts that torch.jit.script made ({scripted}); TorchScript and "
                    "formats made from it can; for the others keep that part in Python"
                ) from error
            if fixed := _FIXED.findall(str(error)):
                raise RuntimeError(_fixed(fixed)) from error
            if site := site_of(error):
                raise RuntimeError(_refused(error, named({site}))) from error
            raise


_FIXED = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it .* constant \((\d+)\)")


def _fixed(axes: Sequence[tuple[str, str, str]]) -> str:
    """Why an axis is not dynamic, of each its input, its number and its size."""
    named = ", ".join(f"axis {axis} of {name} as {size}" for name, axis, size in axes)
    return (
        f"forward uses {named} in Python, which makes it a constant: by a loop over it, say, or by int(), float() or "
        "range() of its size; sizes as they are (x.shape[0]), and functions of whole tensors, keep it dynamic"
    )


def _refused(error: Exception, site: str) -> str:
    """Why `torch.export` refuses what forward does at `site`."""
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    known = isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException)
    if known or any(words in str(error) for words in _NEEDS_VALUES) or _UNKNOWN.fullmatch(str(error)):
        return (
            f"forward reads a value of its data into Python ({site}), which torch.export refuses; use torch.where or "
            "torch.cond, which keep both branches"
        )
    return f"torch.export refuses {site}: {line(error)}"


_NEEDS_VALUES = ("FakeTensor.__format__", "Cannot access data pointer of Tensor")
"""Parts of PyTorch's other errors for what has no values while it is traced."""
_UNKNOWN = re.compile(r"'?u\d+'?")
"""A message that is the name of such a value, as of `KeyError: 'u0'`."""


def _scripted(module: torch.nn.Module) -> str:
    """The names of the outermost scripted submodules."""
    import torch

    parts = module.named_modules()
    names = [name.removeprefix("inner.") for name, part in parts if isinstance(part, torch.jit.ScriptModule)]
    return ", ".join(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _grad_mode_left_alone(module: torch.nn.Module) -> AbstractContextManager[None]:
    """Make `torch.no_grad`, `enable_grad` and `set_grad_enabled` in `module` no-ops."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LeftAlone(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return None if function is torch._C._set_grad_enabled else function(*args, **(kwargs or {}))

    return within(module, lambda _: LeftAlone())


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program of a `.pt2`, with special functions composed of elementary ones, and sorts like any others.

    Adaptive max pools are maxima of slices, if their indices are not used. In-place detaches of constants that forward
    made (`torch.tensor([…])`) are removed: they cannot be exported again.
    """
    import torch

    program = torch.export.load(path)
    aten = torch.ops.aten
    for node in program.graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    pools = {aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default}
    nodes = [node for node in program.graph.nodes if node.target in pools]
    indexed = any(user.args[1] and user.users for node in nodes for user in node.users)
    table: dict[Any, Callable[..., Any]] = {} if indexed else dict.fromkeys(pools, _adaptive_maxima)
    table |= {**special_functions.compositions(), aten.sort.stable: _sorted}
    if not any(_operator(node.target) in table for node in program.graph.nodes):
        return program
    decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed


def _operator(target: Any) -> Any:
    """An operator's functional form, which is what in-place ones become before they are decomposed."""
    import torch

    if not isinstance(target, torch._ops.OpOverload):
        return target
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    return getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, target)


@contextlib.contextmanager
def subclasses_left_out() -> Iterator[None]:
    """Make `Tensor.as_subclass` return the tensor itself: traced tensors are of a subclass already.

    No mode of PyTorch's sees that method, so it is replaced; only a worker may do so, where nothing else runs.
    """
    import torch

    kind: Any = torch.Tensor
    kind.as_subclass = lambda self, cls: self
    try:
        yield
    finally:
        del kind.as_subclass  # what remains is that of its base


def in_float32(module: torch.fx.GraphModule, *dtypes: torch.dtype) -> torch.fx.GraphModule:
    """A program's module with float32 in place of the given `dtypes`; changed in place."""
    import torch
    from torch.fx.node import map_aggregate

    def replaced(value: Any) -> Any:
        return torch.float32 if value in dtypes else value

    for tensors in (module.named_parameters(), module.named_buffers()):
        for _, tensor in tensors:
            tensor.data = tensor.data.float() if tensor.dtype in dtypes else tensor.data
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held = getattr(module, str(node.target), None)
            if isinstance(held, torch.Tensor) and held.dtype in dtypes:
                held.data = held.data.float()
        node.args = map_aggregate(node.args, replaced)
        node.kwargs = map_aggregate(node.kwargs, replaced)
    module.recompile()
    return module


def _sorted(
    x: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sort without a word on ties, which converters do not know: in ONNX the element that was first stays first."""
    import torch

    return torch.ops.aten.sort.default(x, dim, descending)  # type: ignore[no-any-return]  # untyped in torch


def _adaptive_maxima(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima of nearly equal slices, one axis after the other, without indices."""
    import torch

    for axis, count in enumerate(sizes, x.dim() - len(sizes)):
        size = x.shape[axis]
        bounds = [(part * size // count, -(-(part + 1) * size // count)) for part in range(count)]
        parts = [x.narrow(axis, begin, end - begin).amax(axis, keepdim=True) for begin, end in bounds]
        x = torch.cat(parts, axis) if count > 1 else parts[0]
    return x, torch.zeros_like(x, dtype=torch.int64)
