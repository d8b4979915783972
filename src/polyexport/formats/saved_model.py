"""SavedModel: TensorFlow's own format, for TensorFlow Serving and everything that TensorFlow's converters read.

https://www.tensorflow.org/guide/saved_model
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from polyexport.format import Format, Route, Runner, Snippet
from polyexport.spec import Arrays, ExportSpec

SIGNATURE = "serving_default"

_METADATA = "polyexport.json"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the ONNX graph to TensorFlow's operators, under forward's own names."""
    import tensorflow as tf

    from polyexport.lowering.tensorflow import lower

    shaped = [tf.TensorSpec(tensor.sized(lambda _: None), tensor.dtype, tensor.name) for tensor in spec.inputs]
    module = lower(source, shaped)
    tf.saved_model.save(module, str(target), signatures={SIGNATURE: module.forward})
    extra = target / "assets.extra"  # the place for files that TensorFlow leaves alone
    extra.mkdir(exist_ok=True)
    (extra / _METADATA).write_text(json.dumps(dict(spec.metadata)), encoding="utf-8")


def limit_threads(threads: int) -> None:
    """For the whole process; once TensorFlow has run something, it keeps the threads that it has."""
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run its signature with TensorFlow on the CPU."""
    import tensorflow as tf

    limit_threads(threads)
    loaded: Any = tf.saved_model.load(str(path))
    signature = loaded.signatures[SIGNATURE]
    wanted = signature.structured_input_signature[1]

    def run(inputs: Arrays) -> Arrays:
        answer = signature(**{name: tf.constant(inputs[name]) for name in wanted})
        return {tensor.name: answer[tensor.name].numpy() for tensor in spec.outputs}

    run.loaded = loaded  # type: ignore[attr-defined]  # the variables live as long as what reads them
    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import tensorflow as tf

model = tf.saved_model.load("{{ path }}")
call = model.signatures["serving_default"]
batch = np.load("validation_batch.npz")
outputs = call(**{name: tf.constant(batch[name]) for name in call.structured_input_signature[1]})
""",
    ),
)


FORMAT = Format(
    name="saved_model",
    aliases=("tf", "tensorflow"),
    description="TensorFlow SavedModel, for TensorFlow Serving and TensorFlow's converters",
    url="https://www.tensorflow.org/guide/saved_model",
    artifact="saved_model",
    routes=(Route("lowering", upstream="onnx", toolchain="tensorflow", convert=convert),),
    load=load,
    snippets=_SNIPPETS,
)
