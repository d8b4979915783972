"""SavedModel: TensorFlow's own format, for TensorFlow Serving and everything that TensorFlow's converters read.

https://www.tensorflow.org/guide/saved_model
"""

from __future__ import annotations

import contextlib
import keyword
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyexport.format import Format, Route, Snippet, Triton
from polyexport.onnx_graph.names import generated_names, rename_inputs_outputs
from polyexport.spec import Arrays, ExportSpec, Runner

SIGNATURE = "serving_default"


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Lower the ONNX graph to TensorFlow's operators, under forward's own names."""
    import tensorflow as tf

    from polyexport.lowering.protobuf import read
    from polyexport.lowering.tensorflow import lower_model

    names = arguments(spec)
    shaped = [
        tf.TensorSpec(tensor.sized(lambda _: None), tensor.dtype, name)
        for name, tensor in zip(names, spec.inputs, strict=True)
    ]
    model = read(source)
    rename_inputs_outputs(
        model, {own: name for name, own in names.items()}, [output.name for output in model.graph.output]
    )
    module = lower_model(model, shaped)
    tf.saved_model.save(module, str(target), signatures={SIGNATURE: module.forward})
    if tuple(names) != spec.input_names:
        _rename_inputs(target / "saved_model.pb", names)
    _settle_fingerprint(target / "fingerprint.pb")
    extra = target / "assets.extra"  # a folder for files that TensorFlow ignores
    extra.mkdir(exist_ok=True)
    for name, text in spec.extra_files.items():
        (extra / name).write_text(text, encoding="utf-8")


def _settle_fingerprint(path: Path) -> None:
    """Replace the SavedModel's random id by a hash of its content."""
    from tensorflow.core.protobuf.fingerprint_pb2 import FingerprintDef

    found = FingerprintDef()
    found.ParseFromString(path.read_bytes())
    found.uuid = ""
    found.uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, found.SerializeToString(deterministic=True).hex()))
    path.write_bytes(found.SerializeToString(deterministic=True))


def arguments(spec: ExportSpec) -> dict[str, str]:
    """Names of the TensorFlow function's arguments by forward's inputs: the same, or generated ones.

    TensorFlow does not distinguish names that differ only in case or in non-ASCII characters.
    """
    own = spec.input_names
    plain = all(re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) and not keyword.iskeyword(name) for name in own)
    if plain and len({name.lower() for name in own}) == len(own):
        return {name: name for name in own}
    ours = dict(zip(sorted(own), generated_names("input", len(own)), strict=True))  # a signature is sorted by name
    return {ours[name]: name for name in own}


def _rename_inputs(path: Path, names: Mapping[str, str]) -> None:
    """Rename the signature's inputs to forward's names, wherever a SavedModel stores them."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    file = SavedModel()
    file.ParseFromString(path.read_bytes())
    (graph,) = file.meta_graphs
    _rename_keys(graph.signature_def[SIGNATURE].inputs, names)
    nodes = graph.object_graph_def.nodes
    for bare in (node.bare_concrete_function for node in nodes if node.HasField("bare_concrete_function")):
        bare.argument_keywords[:] = [names.get(word, word) for word in bare.argument_keywords]
        if bare.HasField("function_spec"):
            _rename_words(bare.function_spec.fullargspec, names)
    for function in graph.object_graph_def.concrete_functions.values():
        _rename_words(function.canonicalized_input_signature, names)
    path.write_bytes(file.SerializeToString(deterministic=True))


def _rename_words(value: Any, names: Mapping[str, str]) -> None:
    """Rename inputs in a `StructuredValue` of TensorFlow, at any depth."""
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        value.string_value = names.get(value.string_value, value.string_value)
    elif kind in ("list_value", "tuple_value"):
        for part in getattr(value, kind).values:
            _rename_words(part, names)
    elif kind == "named_tuple_value":
        for pair in value.named_tuple_value.values:
            _rename_words(pair.value, names)
    elif kind == "dict_value":
        _rename_keys(value.dict_value.fields, names)
        for part in value.dict_value.fields.values():
            _rename_words(part, names)
    elif kind == "tensor_spec_value":
        value.tensor_spec_value.name = names.get(value.tensor_spec_value.name, value.tensor_spec_value.name)


def _rename_keys(table: Any, names: Mapping[str, str]) -> None:
    moved = {name: table[name].SerializeToString() for name in names if name in table}
    for name in moved:
        del table[name]
    for name, content in moved.items():
        table[names[name]].ParseFromString(content)


def limit_threads(threads: int) -> None:
    """Set the number of threads of the process; TensorFlow ignores this after it has run something."""
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

    run.loaded = loaded  # type: ignore[attr-defined]  # keeps the variables alive
    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import tensorflow as tf

model = tf.saved_model.load("{{ path }}")
call = model.signatures["serving_default"]
batch = np.load("{{ batch }}")
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
    graph="saved_model/saved_model.pb",
    routes=(Route("lowering", upstream="onnx", toolchain="tensorflow", convert=convert),),
    load=load,
    slow_because="TensorFlow multiplies small matrices on one thread, and a recurrent layer is many small operators",
    targets=("server CPU",),
    triton=Triton("tensorflow_savedmodel", "model.savedmodel", is_platform=True),
    snippets=_SNIPPETS,
)
