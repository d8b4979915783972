"""Names of an ONNX graph's inputs and outputs, set after the export.

Exporters name inner values after operators (`linear`, `embedding`), and users may name their outputs the same. Names in
a graph are unique, so the graph is exported with generated names, and gets the user's at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def generated_names(kind: str, count: int) -> list[str]:
    """Generated names for a graph's inputs or outputs, which no exporter uses and which sort in their order."""
    return [f"polyexport_{kind}_{index:04}" for index in range(count)]


def rename_inputs_outputs(model: onnx.ModelProto, inputs: Mapping[str, str], outputs: Sequence[str]) -> None:
    """Rename inputs (old to new) and outputs (in order); an inner value that has one of the new names gets another.

    An output that is also an input, a weight or another output gets an Identity.
    """
    import onnx

    graph = model.graph
    present = set(_names(graph))
    edge = {*inputs.values(), *outputs}
    fresh = filter(lambda name: name not in present, map("polyexport_value_{}".format, itertools.count()))
    names = {name: next(fresh) for name in sorted(present & edge)} | dict(inputs)
    fixed = {value.name for value in (*graph.input, *graph.initializer)}
    fixed |= {sparse.values.name for sparse in graph.sparse_initializer}
    for output, name in zip(graph.output, outputs, strict=True):
        if output.name in fixed:
            source, output.name = output.name, next(fresh)
            graph.node.add().CopyFrom(onnx.helper.make_node("Identity", [source], [output.name]))
        fixed.add(output.name)
        names[output.name] = name
    _rename(graph, names)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those of its If, Loop and Scan, which see its values."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(body)


def _named(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto | onnx.TensorProto]:
    yield from (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    yield from (sparse.values for sparse in graph.sparse_initializer)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for each in _graphs(graph):
        yield from (value.name for value in _named(each))
        for node in each.node:
            yield from (*node.input, *node.output)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for each in _graphs(graph):
        for value in _named(each):
            value.name = names.get(value.name, value.name)
        for node in each.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
