"""A pass over a MIL program: casts to bool become comparisons with zero, which the fusion of casts keeps.

coremltools fuses two casts, so that 0.5 → int → bool becomes true; this pass runs before that one.
"""

from __future__ import annotations

from typing import Any

from polyexport.coreml.patches.scatter_ops import _kind


def register() -> None:
    """Insert it before coremltools' fusion of casts, in this process."""
    from coremltools.converters.mil.mil.passes.defs.optimize_repeat_ops import cast_optimization
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class KeepsTruth(cast_optimization):  # type: ignore[misc]  # coremltools has no types
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                _compare(function)
            super().apply(prog)

    register_pass(namespace="common", override=True, name="cast_optimization")(KeepsTruth)


def _compare(block: Any) -> None:
    for operation in list(block.operations):
        for inner in operation.blocks:
            _compare(inner)
        if operation.op_type == "cast" and operation.dtype.val == "bool" and _kind(operation.x) in _ZEROS:
            with block:
                _replace(block, operation)


_ZEROS = {"fp16": 0.0, "fp32": 0.0, "int32": 0}
"""By the dtypes that MIL compares."""


def _replace(block: Any, cast: Any) -> None:
    from coremltools.converters.mil import Builder as mb

    kind, old = _kind(cast.x), cast.outputs[0]
    zero = mb.cast(x=_ZEROS[kind], dtype=kind, before_op=cast)
    true = mb.not_equal(x=cast.x, y=zero, before_op=cast, name=cast.name)
    block.replace_uses_of_var_after_op(anchor_op=cast, old_var=old, new_var=true)
    block.remove_ops([cast])
