"""Reads ONNX's messages: a file, and attributes and constants as Python and numpy have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its weights, and inline its functions."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    model = onnx.load(path, load_external_data=False)
    if model.functions:  # before weights are loaded, since the inliner is limited to 2 GB
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    load_external_data_for_model(model, str(path.parent))
    return model


def attribute_value(attribute: onnx.AttributeProto) -> Any:
    """Text as `str`, a tensor as a numpy array, several values as a list; graphs and types stay messages."""
    import onnx
    from onnx import numpy_helper

    found = onnx.helper.get_attribute_value(attribute)
    if isinstance(found, bytes):
        return found.decode()
    if isinstance(found, onnx.TensorProto):
        return numpy_helper.to_array(found)
    if isinstance(found, onnx.GraphProto | onnx.TypeProto | onnx.SparseTensorProto | int | float):
        return found
    return [each.decode() if isinstance(each, bytes) else each for each in found]


def dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """A sparse constant as a dense array."""
    from onnx import numpy_helper

    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.ravel()[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def domain_name(name: str) -> str:
    """ONNX's own domain, which has two names, as an empty one."""
    return "" if name == "ai.onnx" else name
