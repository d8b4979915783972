"""Flattens containers that PyTorch's pytree treats as leaves: mappings such as `BatchEncoding`, and dataclasses.

They are converted to boxes, which pytree can flatten, and back to their own class before forward gets them. Their
classes are not registered with pytree, since that would affect the user's whole process.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Box:
    """The content of a container by key or field, and a container to copy the rest from."""

    like: Any
    content: Mapping[str, Any]


def opened(value: Any) -> Any:
    """`value` with each such container replaced by a `Box`, at any depth."""
    return _pytree().tree_map(_box, value)


def closed(value: Any) -> Any:
    """`value` with each `Box` replaced by the original kind of container, with the box's content."""
    return _pytree().tree_map(
        lambda leaf: _unbox(leaf) if isinstance(leaf, Box) else leaf, value, is_leaf=lambda leaf: isinstance(leaf, Box)
    )


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value`, opened, with `function` applied to each leaf."""
    return _pytree().tree_map(function, value)


def _box(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):
        return Box(leaf, {key: opened(item) for key, item in leaf.items()})
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return Box(leaf, {field.name: opened(getattr(leaf, field.name)) for field in dataclasses.fields(leaf)})
    return leaf


def _unbox(box: Box) -> Any:
    content = {key: closed(item) for key, item in box.content.items()}
    kind: Any = type(box.like)
    if isinstance(box.like, Mapping) and not isinstance(box.like, MutableMapping):
        return kind(content)  # such as a mappingproxy, or a frozendict
    try:
        made = copy.copy(box.like)
    except Exception:  # a class may refuse to be copied in any way
        made = kind.__new__(kind)
        vars(made).update(vars(box.like))
    for key, item in content.items():
        if isinstance(made, MutableMapping):
            made[key] = item
        else:
            object.__setattr__(made, key, item)  # also for frozen dataclasses
    return made


@functools.cache
def _pytree() -> Any:
    from torch.utils import _pytree as pytree

    def keys(box: Box) -> tuple[list[tuple[Any, Any]], Any]:
        return [(pytree.MappingKey(key), item) for key, item in box.content.items()], (box.like, tuple(box.content))

    def flatten(box: Box) -> tuple[list[Any], Any]:
        return list(box.content.values()), (box.like, tuple(box.content))

    def unflatten(items: Iterable[Any], context: Any) -> Box:
        like, names = context
        return Box(like, dict(zip(names, items, strict=True)))

    pytree.register_pytree_node(Box, flatten, unflatten, flatten_with_keys_fn=keys)
    return pytree
