"""A module as a flat function: named tensors in, named tensors out.

Every converter gets this form, because the tracers of TorchScript and Core ML do not support dicts. The names are those
of forward's arguments and of the keys in what it returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polyexport.capture.pytree import closed, opened
from polyexport.capture.threads import in_one_thread
from polyexport.capture.unwrap import own_attributes
from polyexport.errors import BadRequest
from polyexport.spec import Arrays, ExportSpec, Runner

if TYPE_CHECKING:
    import torch
    from torch import nn

_NO_AUTOGRAD = ("does not require grad", "saved for backward", "requires_grad=True on inference tensor")
"""Parts of PyTorch's errors for differentiation with autograd off."""
_DIFFERENTIATES = (
    "forward differentiates (torch.autograd.grad or backward), and no deployment format supports that: write the "
    "derivative explicitly in forward, or export the differentiated part with module=<that part>"
)

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


def flat(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Wrap `module` as a function of the tensors in `args` and `kwargs`, by name, that returns its output tensors.

    Values in the call that are not tensors become constants. The wrapper is in eval mode. It has `input_names`, the
    `example` inputs of the call, and `output_names`, which are set when it runs. Callers may set `kept`, the names of
    the outputs to return, and `within`, contexts to run in. One output is returned as a tensor, several as a tuple.
    Outputs of dtypes that numpy lacks, such as bfloat16, are returned as float32, and their names are in `widened`.
    Complex inputs and outputs are pairs of real numbers in a last axis of 2, and their names are in `paired`.

    Raises:
        BadRequest: there is no tensor in the call, or one is in an object that cannot be flattened.
    """
    import torch
    from torch.utils import _pytree as pytree

    leaves, tree, inputs = flattened_call(module.forward, args, kwargs)
    check_dense({name: leaves[index] for name, index in inputs.items()})

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.input_names = tuple(inputs)
            self.output_names: tuple[str, ...] = ()
            self.dropped: tuple[str, ...] = ()
            self.kept: tuple[str, ...] | None = None
            self.widened: tuple[str, ...] = ()
            self.paired: tuple[str, ...] = ()
            self.within: Sequence[AbstractContextManager[Any]] = ()
            self.example = tuple(as_taken(leaves[index]) for index in inputs.values())

        def forward(self, *tensors: Any) -> Any:
            values = list(leaves)
            for index, tensor in zip(inputs.values(), tensors, strict=True):
                values[index] = _combined(tensor) if leaves[index].is_complex() else tensor
            call_args, call_kwargs = closed(pytree.tree_unflatten(values, tree))
            try:
                with contextlib.ExitStack() as entered:
                    entered.enter_context(in_one_thread())
                    for context in self.within:
                        entered.enter_context(context)
                    answer = self.inner(*call_args, **call_kwargs)
            except RuntimeError as error:
                if any(words in str(error) for words in _NO_AUTOGRAD):
                    raise BadRequest(_DIFFERENTIATES) from error
                raise
            outputs, self.dropped = named_tensors(answer, taken=inputs)
            if self.kept is not None:
                outputs = {name: outputs[name] for name in self.kept}
            self.output_names = tuple(outputs)
            self.widened = tuple(name for name, tensor in outputs.items() if _is_narrow(tensor))
            given = (name for name, index in inputs.items() if leaves[index].is_complex())
            self.paired = (*given, *(name for name, tensor in outputs.items() if tensor.is_complex()))
            outputs = {name: t.float() if name in self.widened else in_pairs(t) for name, t in outputs.items()}
            return tuple(outputs.values()) if len(outputs) > 1 else next(iter(outputs.values()))

    # tracers take argument names from the signature
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in _argument_identifiers(("self", *inputs))]
    Flat.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function has one
    return Flat().eval()


def as_taken(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a call as an artifact takes it: floats in float32, complex numbers in pairs."""
    pairs = in_pairs(tensor)
    return pairs.float() if pairs.is_floating_point() else pairs


def in_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as real and imaginary parts in a last axis of 2; other tensors unchanged."""
    import torch

    return torch.stack([tensor.real, tensor.imag], -1) if tensor.is_complex() else tensor


def _combined(pairs: torch.Tensor) -> torch.Tensor:
    """The complex numbers of `in_pairs`."""
    import torch

    return torch.complex(pairs[..., 0], pairs[..., 1])


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The user's inputs as a call: a dict is keyword arguments, a tuple or list positional ones, else one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _is_narrow(tensor: torch.Tensor) -> bool:
    """Whether it has a floating-point dtype that numpy lacks: bfloat16 and those of one byte."""
    import torch

    return tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64)


def constants(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a call of `forward` that are not tensors, by name."""
    import torch

    leaves, _, names = _named_leaves(forward, args, kwargs)
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if not isinstance(leaf, torch.Tensor)}


def with_constants(
    forward: Callable[..., Any], call: tuple[Sequence[Any], Mapping[str, Any]], changed: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The call with other values for some of its `constants`."""
    from torch.utils import _pytree as pytree

    leaves, tree, names = _named_leaves(forward, *call)
    values = [changed.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    found: tuple[Sequence[Any], Mapping[str, Any]] = closed(pytree.tree_unflatten(values, tree))
    return found


def _named_leaves(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Any, list[str]]:
    """The leaves of a call, their tree, and a name for each; only tensors' names are unique."""
    import torch
    from torch.utils import _pytree as pytree

    paths, tree = pytree.tree_flatten_with_path(opened((tuple(args), dict(kwargs))))
    arguments = _argument_names(forward, len(args))
    taken: dict[str, Any] = {}
    names = []
    for path, leaf in paths:
        names.append(_unique(_identifier("_".join([_first(path, arguments), *map(_key, path[2:])])), taken))
        if isinstance(leaf, torch.Tensor):
            taken[names[-1]] = leaf
    return [leaf for _, leaf in paths], tree, names


def flattened_call(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Any, dict[str, int]]:
    """The leaves of a call of `forward`, their tree, and the index of each tensor among the leaves, by name.

    Raises:
        BadRequest: there is no tensor in the call, or one is in an object that cannot be flattened.
    """
    import torch

    leaves, tree, names = _named_leaves(forward, args, kwargs)
    inputs: dict[str, int] = {}
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if isinstance(leaf, torch.Tensor):
            inputs[name] = index
        elif _holds_tensors(leaf):
            kind = type(leaf).__name__
            raise BadRequest(
                f"forward's argument {name} is a {kind} with tensors in it, which no converter supports; give "
                "inputs=<a function of the batch> that returns tensors (or tuples and dicts of them), and "
                f"module=<a wrapper whose forward builds the {kind} from them>"
            )
    if not inputs:
        raise BadRequest("forward received no tensor; give inputs=<a function of the batch> that returns tensors")
    return leaves, tree, inputs


def check_dense(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a BadRequest if one of the inputs, by name, is sparse or nested."""
    import torch

    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else "sparse"
            raise BadRequest(
                f"forward's argument {name} is a {kind} tensor, which no converter can take; give "
                f"inputs=<a function of the batch> that returns dense ones, and module=<a wrapper whose forward makes "
                f"the {kind} one from them>"
            )


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    """Whether an object has tensors among its attributes, or in those."""
    import torch

    if isinstance(leaf, torch.Tensor):
        return True
    if isinstance(leaf, Mapping):
        held: Iterable[Any] = leaf.values()
    elif isinstance(leaf, list | tuple | set):
        held = leaf
    else:
        held = own_attributes(leaf).values() if not isinstance(leaf, type | ModuleType) else ()
    return depth > 0 and any(_holds_tensors(item, depth - 1) for item in held)


def named_tensors(value: Any, taken: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors in what forward returned, by name, and the names of leaves that are not tensors.

    Names are the keys of a dict or dataclass, and `output_0`, `output_1` … for a tuple; nested ones are joined by `_`.
    A packed sequence becomes `…_padded`, with the batch first and zeros after each end, and `…_lengths`.
    A name that an input has already (`taken`) gets the suffix `_output`, since names in a graph are unique.

    Raises:
        BadRequest: there is no tensor.
    """
    outputs: dict[str, Any] = {}
    dropped: list[str] = []
    for name, leaf in _walk(value, ""):
        if leaf is None:
            dropped.append(name)
        else:
            clean = _identifier(name)
            outputs[_unique(f"{clean}_output" if clean in taken else clean, outputs)] = leaf
    if not outputs:
        raise BadRequest(
            f"forward returned a {type(value).__name__} without a tensor in it; return tensors, or dicts, tuples or "
            "dataclasses of them, or give module=<a wrapper that does>"
        )
    return outputs, tuple(dropped)


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch
    from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

    if isinstance(value, torch.Tensor):
        yield name or "output_0", value
    elif isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        yield from _walk({"padded": padded, "lengths": lengths}, name or "output_0")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}_{key}" if name else str(key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), f"{name}_{field.name}" if name else field.name)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, item in zip(value._fields, value, strict=True):
            yield from _walk(item, f"{name}_{key}" if name else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name or 'output'}_{index}")
    elif not isinstance(value, _CONSTANTS):
        yield f"{name or 'output'} ({type(value).__name__})", None


def _argument_names(forward: Callable[..., Any], count: int) -> list[str]:
    """Names of the first `count` positional arguments of `forward`."""
    names: list[str] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return names


def _argument_identifiers(names: Sequence[str]) -> list[str]:
    """The names as identifiers for generated code: none is a keyword, a builtin or a name used there."""
    import torch

    graph = torch.fx.Graph()
    legal = (f"{name}_" if keyword.iskeyword(name) else name for name in names)
    return [graph.create_node("placeholder", name, name=name).name for name in legal]


def _first(path: Any, names: Sequence[str]) -> str:
    argument = path[1]
    return names[argument.idx] if path[0].idx == 0 else str(argument.key)


def _key(entry: Any) -> str:
    """One step of a pytree path: a dict's key, a tuple's index or a field's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _identifier(name: str) -> str:
    clean = re.sub(r"\W", "_", name)
    return f"_{clean}" if clean[:1].isdigit() else clean


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{n}" for n in range(2, len(taken) + 3) if f"{name}_{n}" not in taken)


def to_arrays(names: Sequence[str], tensors: Any) -> Arrays:
    """Name the tensors that a flat module returned, as numpy arrays."""
    import torch

    listed = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, listed, strict=True)}


def as_runner(module: Any, spec: ExportSpec | None = None) -> Runner:
    """A flat module as a function of named arrays; without `spec` it uses the module's own names."""
    import torch

    def run(inputs: Arrays) -> Arrays:
        names = spec.input_names if spec else module.input_names
        with torch.inference_mode():
            answer = module(*(torch.from_numpy(inputs[name]) for name in names))
        return to_arrays(spec.output_names if spec else module.output_names, answer)

    return run
