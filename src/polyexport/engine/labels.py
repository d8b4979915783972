"""The user's labels and metadata, which are embedded in each artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from polyexport.engine.request import Request
from polyexport.errors import BadRequest
from polyexport.measure.reference import Reference
from polyexport.spec import ExportSpec, TensorSpec

_IMAGE_AXES = 4
"""Number of axes of an output with its classes second: `(N, C, H, W)`."""


UNORDERED = (str, Mapping, Set)
"""Collections of strings that are no list of labels: of a mapping of names to indices the order is not known."""


def is_list(labels: object) -> bool:
    """Whether this can be a list of labels."""
    return isinstance(labels, Iterable) and not isinstance(labels, UNORDERED)


def check(labels: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Refuse what cannot be embedded.

    Raises:
        BadRequest: a label or an entry is not a string, or has characters that files cannot have, or a label has a line
            break.
    """
    if not is_list(labels) or not all(isinstance(label, str) for label in labels):
        raise BadRequest(f"labels={labels!r}; give a list of strings, one for each class in order")
    if broken := [label for label in labels if f"{label}.".splitlines() != [f"{label}."]]:
        raise BadRequest(f"the label {broken[0]!r} has a line break; give labels of one line")
    if not isinstance(metadata, Mapping) or not all(
        isinstance(part, str) for entry in metadata.items() for part in entry
    ):
        raise BadRequest(f"metadata={metadata!r}; give a mapping of strings to strings")
    for text in (*labels, *(part for entry in metadata.items() for part in entry)):
        if wrong := _unwritable(text):
            raise BadRequest(f"{text!r} in labels or metadata has {wrong}, which no format can embed")


def _unwritable(text: str) -> str:
    """What a text has that files of text cannot have; empty if nothing."""
    if "\0" in text:
        return "a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return ""


def with_labels(request: Request, reference: Reference) -> Reference:
    """The reference with the labels and metadata of the request in its signature."""
    spec, unlabeled = labeled(reference.spec, request.labels, request.metadata)
    return replace(reference, spec=spec, unlabeled=unlabeled)


def labeled(spec: ExportSpec, labels: Sequence[str], metadata: Mapping[str, str]) -> tuple[ExportSpec, str]:
    """The signature with labels and metadata, and why the labels are left out, if they are.

    Entries that polyexport itself writes into `spec.metadata` win over the user's of the same name.
    """
    spec = replace(spec, metadata={**metadata, **spec.metadata})
    if not labels:
        return spec, ""
    if not any(len(labels) in _classes(tensor) or _are_indices(tensor) for tensor in spec.outputs):
        outputs = "; ".join(map(str, spec.outputs))
        return spec, f"labels are left out: no output has {len(labels)} classes in its last axis ({outputs})"
    return replace(spec, labels=tuple(labels)), ""


def _classes(tensor: TensorSpec) -> tuple[int | str, ...]:
    """The sizes of which one must be the number of labels."""
    return (*tensor.shape[-1:], *(tensor.shape[1:2] if len(tensor.shape) == _IMAGE_AXES else ()))


def _are_indices(tensor: TensorSpec) -> bool:
    """Whether an output may hold the indices of classes, as those of `argmax` and `topk` do."""
    return np.dtype(tensor.dtype).kind in "iu"
