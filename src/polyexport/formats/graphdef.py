"""GraphDef: TensorFlow 1's frozen graph in one file, for runtimes without support for SavedModel.

https://www.tensorflow.org/api_docs/python/tf/compat/v1/GraphDef
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polyexport.format import Format, Route, Snippet
from polyexport.formats.saved_model import SIGNATURE, arguments, limit_threads
from polyexport.spec import Arrays, ExportSpec, Runner

_MESSAGE_BYTES = 2**31


def check_size(source: Path) -> None:
    """Refuse weights that are too large for a frozen graph, before memory is filled with several copies of them.

    Raises:
        ValueError: they are larger than one protobuf message may be (https://protobuf.dev/programming-guides/encoding/).
    """
    weights = sum(file.stat().st_size for file in (source / "variables").iterdir())
    if weights >= _MESSAGE_BYTES:
        raise ValueError(f"a frozen graph is limited to 2 GiB, but the weights take {weights / 2**30:.2f} GiB")


def convert(source: Path, target: Path, spec: ExportSpec) -> None:
    """Freeze the SavedModel's signature: variables become constants, and inputs and outputs get forward's names."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    check_size(source)
    loaded = tf.saved_model.load(str(source))
    frozen = convert_variables_to_constants_v2(loaded.signatures[SIGNATURE], lower_control_flow=False)
    # a signature sorts its inputs and outputs by their names in the trace
    inputs = {
        port.op.name: name for port, (_, name) in zip(frozen.inputs, sorted(arguments(spec).items()), strict=True)
    }
    graph = frozen.graph.as_graph_def()
    # nodes are renamed in the protobuf, since graph construction does not distinguish `x` and `X`
    for node in graph.node:
        node.name = _renamed(node.name, inputs)
        node.input[:] = [_renamed(each, inputs) for each in node.input]
    for name, port in zip(sorted(spec.output_names), frozen.outputs, strict=True):
        node = graph.node.add(name=name, op="Identity", input=[_renamed(port.name, inputs)])
        node.attr["T"].type = port.dtype.as_datatype_enum
    target.write_bytes(graph.SerializeToString(deterministic=True))


def _renamed(reference: str, inputs: Mapping[str, str]) -> str:
    """A node's name, or an edge's (`^name`, `name:1`): inputs get forward's names, the others the prefix `model/`."""
    control = "^" if reference.startswith("^") else ""
    name, colon, index = reference.removeprefix("^").partition(":")
    return f"{control}{inputs.get(name, f'model/{name}')}{colon}{index}"


def load(path: Path, spec: ExportSpec, *, threads: int) -> Runner:
    """Run it as TensorFlow 1 did, in a session."""
    import tensorflow as tf

    limit_threads(threads)
    definition = tf.compat.v1.GraphDef()
    definition.ParseFromString(path.read_bytes())
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(definition, name="")
    session = tf.compat.v1.Session(graph=graph)
    wanted = {tensor.name: f"{tensor.name}:0" for tensor in spec.outputs}

    def run(inputs: Arrays) -> Arrays:
        found: Arrays = session.run(wanted, {f"{tensor.name}:0": inputs[tensor.name] for tensor in spec.inputs})
        return found

    return run


_SNIPPETS = (
    Snippet(
        "Python",
        """\
import numpy as np
import tensorflow as tf

definition = tf.compat.v1.GraphDef.FromString(open("{{ path }}", "rb").read())
with tf.Graph().as_default() as graph:
    tf.graph_util.import_graph_def(definition, name="")
batch = np.load("{{ batch }}")
with tf.compat.v1.Session(graph=graph) as session:
    inputs = {f"{name}:0": batch[name] for name in {{ names | tojson }}}
    outputs = session.run([f"{name}:0" for name in {{ outputs | tojson }}], inputs)
""",
    ),
)


FORMAT = Format(
    name="graphdef",
    aliases=("pb",),
    description="Frozen TensorFlow graph in one .pb file, for runtimes of TensorFlow 1",
    url="https://www.tensorflow.org/api_docs/python/tf/compat/v1/GraphDef",
    artifact="model.pb",
    graph="model.pb",
    routes=(Route("freeze", upstream="saved_model", toolchain="tensorflow", convert=convert),),
    load=load,
    slow_because="TensorFlow multiplies small matrices on one thread, and a recurrent layer is many small operators",
    targets=("server CPU",),
    snippets=_SNIPPETS,
)
