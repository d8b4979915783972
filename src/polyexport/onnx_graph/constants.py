"""Values in an ONNX graph that are computed from constants: exporters do not fold large weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx


class Constants:
    """The constants of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._versions = {each.domain: each.version for each in model.opset_import}
        self._weights = {each.name: each for each in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}

    def find(self, name: str) -> np.ndarray | None:
        """The value of this name, computed by the implementation that comes with ONNX; None if it is no constant."""
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self._weights:
            return numpy_helper.to_array(self._weights[name])
        node = self._makers.get(name)
        if node is None or not (node.input or node.op_type == "Constant"):
            return None
        given = {}
        for each in filter(None, node.input):
            value = self.find(each)
            if value is None:
                return None
            given[each] = value
        made: Any = ReferenceEvaluator(node, opsets=self._versions).run(None, given)
        found: np.ndarray = made[list(node.output).index(name)]
        return found
