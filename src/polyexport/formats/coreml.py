"""Core ML: an ML Program for Apple's devices, in float32 and float16.

https://apple.github.io/coremltools/docs-guides/

Requirements:
* Core ML has no int64 and no bool inputs or outputs: such inputs and all integer outputs are int32, and bool outputs
  are float32. They are cast inside the graph, so that the model computes what PyTorch does. There are no scalar inputs
  either: they have one element.
* Names are kept, except keywords of MIL, such as `state`, and characters that MIL does not allow: the report then shows
  the package's own signature, and says so.
* A dynamic axis needs an upper bound in an ML Program; it gets a large one.
* On macOS the package is run by Core ML. Elsewhere the saved package is read and evaluated (see `polyexport.coreml`),
  independently of the conversion.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.coreml.settle import settle
from polyexport.errors import CannotRun
from polyexport.format import Convert, Format, Loaded, Observed, OnDevice, Route, Snippet
from polyexport.spec import Arrays, ExportSpec, Precision, Runner, TensorSpec, example

if TYPE_CHECKING:
    import torch

# --- conversion -------------------------------------------------------------------------------------------------------


def convert_trace(source: Path, target: Path, spec: ExportSpec, *, precision: str) -> None:
    """Convert the TorchScript trace, traced again with the casts that Core ML's inputs and outputs need."""
    import torch

    module, inputs = _behind_casts(torch.jit.load(str(source)), spec)
    with torch.inference_mode():
        traced = torch.jit.trace(module, inputs, check_trace=False)
    with _equal_nans():
        _convert(traced, target, spec, precision)


@contextlib.contextmanager
def _equal_nans() -> Iterator[None]:
    """Make `torch.equal` take NaN for equal to itself, as coremltools compares each weight with the state dict's."""
    import torch

    plain = torch.equal

    def equal(input: torch.Tensor, other: torch.Tensor) -> bool:
        if plain(input, other) or input.shape != other.shape or input.dtype != other.dtype:
            return plain(input, other)
        return torch.allclose(input, other, rtol=0, atol=0, equal_nan=True)

    torch.equal = equal
    try:
        yield
    finally:
        torch.equal = plain


def convert_program(source: Path, target: Path, spec: ExportSpec, *, precision: str) -> None:
    """Convert the program of `torch.export`, exported again with the same casts and with upper bounds."""
    import torch

    # functional first: constants made in forward are detached in place, which cannot be exported again
    module, inputs = _behind_casts(torch.export.load(source).run_decompositions({}).module(), spec)
    free = {called: torch.export.Dim(called, min=1, max=upper) for called, upper in _uppers(spec).items()}
    shapes = tuple({axis: free[called] for axis, called in tensor.dynamic.items()} for tensor in spec.inputs)
    program = torch.export.export(module, inputs, dynamic_shapes={"tensors": shapes} if free else None, strict=False)
    _convert(_known_only(program), target, spec, precision)


def _known_only(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with ops that coremltools lacks decomposed, as far as PyTorch can."""
    import torch
    from coremltools.converters.mil.frontend.torch.torch_op_registry import is_torch_fx_node_supported
    from torch._decomp import decomposition_table

    from polyexport.coreml.patches import composite_ops

    composite_ops.register()
    parts = {**decomposition_table, **torch.export.default_decompositions()}
    program = program.run_decompositions({})
    for node in program.graph.nodes:
        if _is_bicubic_sampling(node):  # the parts of the other modes are more than coremltools has
            node.target = torch.ops.aten.grid_sampler_2d.default
    for _ in range(4):  # the parts of an op may be missing too
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        lacking = {node.target for node in nodes if not is_torch_fx_node_supported(node)}
        if not lacking & parts.keys():
            break
        program = program.run_decompositions({op: parts[op] for op in lacking & parts.keys()})
    return program


def _is_bicubic_sampling(node: torch.fx.Node) -> bool:
    """Whether a node is a `grid_sample` in bicubic mode, which Core ML lacks."""
    import torch

    return node.target is torch.ops.aten.grid_sampler.default and bool(node.args[2] == 2)


def _behind_casts(module: Any, spec: ExportSpec) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Wrap the module to take Core ML's dtypes; returns it with inputs to trace it with.

    Each output is a tensor of its own, not an input or another output, since MIL has one name per value.
    """
    import torch

    def as_own(tensor: torch.Tensor, own: TensorSpec) -> torch.Tensor:
        cast = tensor.to(getattr(torch, own.dtype))
        return cast if own.shape else cast.squeeze(0)

    class Behind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> Any:
            outputs = self.inner(*map(as_own, tensors, spec.inputs))
            if isinstance(outputs, torch.Tensor):
                return outputs.clone()
            return tuple(output.clone() for output in outputs)

    return Behind(), tuple(map(torch.from_numpy, _example(spec).values()))


def _example(spec: ExportSpec) -> Arrays:
    """The inputs to trace with, in Core ML's dtypes."""
    pairs = zip(example(spec).items(), as_core_ml(spec).inputs, strict=True)
    return {name: array.astype(there.dtype) for (name, array), there in pairs}


def _uppers(spec: ExportSpec) -> dict[str, int]:
    """The upper bound of each dynamic axis of the inputs."""
    names = {called for tensor in spec.inputs for called in tensor.dynamic.values()}
    return {called: most for called, most in spec.upper_bounds(1024).items() if called in names}


def as_core_ml(spec: ExportSpec) -> ExportSpec:
    """The signature in Core ML: float32 and int32, with distinct names that MIL allows."""
    from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    names: dict[str, str] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        name = NameSanitizer().sanitize_name(tensor.name)
        while tensor.name not in names and name in names.values():
            name += "_"
        names.setdefault(tensor.name, name)

    def there(tensor: TensorSpec, floats: str) -> TensorSpec:
        dtype = "float32" if np.dtype(tensor.dtype).kind in floats else "int32"
        return replace(tensor, name=names[tensor.name], dtype=dtype)

    inputs = tuple(replace(there(tensor, "f"), shape=tensor.shape or (1,)) for tensor in spec.inputs)
    return replace(spec, inputs=inputs, outputs=tuple(there(tensor, "fb") for tensor in spec.outputs))


def _convert(model: Any, target: Path, spec: ExportSpec, precision: str) -> None:
    """Write a package for the oldest systems that support all its ops."""
    import coremltools as ct

    from polyexport.coreml.patches import composite_ops, fourier, high_rank_pass, named_failures, truth_pass

    for patch in (composite_ops, fourier, high_rank_pass, truth_pass, named_failures):
        patch.register()
    try:
        package = _translated(model, spec, precision, None)
    except ValueError as error:
        if "minimum_deployment_target" not in str(error):
            raise
        print(f"for iOS 18 and macOS 15 only, since: {error}")
        package = _translated(model, spec, precision, ct.target.iOS18)
    package.user_defined_metadata.update(spec.embedded)
    if spec.labels:  # where Xcode's preview reads them
        preview = json.dumps({"labels": spec.labels}, ensure_ascii=False)
        package.user_defined_metadata["com.apple.coreml.model.preview.params"] = preview
    save(package, target)


def save(package: Any, target: Path) -> None:
    """Write a package, the same bytes for the same program."""
    package.save(str(target))
    settle(target)


def _translated(model: Any, spec: ExportSpec, precision: str, oldest: Any) -> Any:
    import coremltools as ct

    free = {called: ct.RangeDim(1, upper, spec.sizes[called]) for called, upper in _uppers(spec).items()}
    own = as_core_ml(spec)
    return ct.convert(
        model,
        convert_to="mlprogram",
        inputs=[
            ct.TensorType(
                name=tensor.name,
                shape=tensor.sized(free.__getitem__),
                dtype=np.dtype(tensor.dtype).type,
            )
            for tensor in own.inputs
        ],
        outputs=[ct.TensorType(name=tensor.name) for tensor in own.outputs],
        compute_precision=ct.precision(precision),
        minimum_deployment_target=oldest,
        skip_model_load=True,
    )


# --- running ----------------------------------------------------------------------------------------------------------


def load(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with Core ML on macOS; elsewhere evaluate its program."""
    if sys.platform == "darwin":
        return load_on_mac(path, spec, threads=threads)
    return replace(
        package(_evaluated(path, threads), spec),
        stand_in="its program is evaluated op by op, which says nothing about Core ML's speed",
        observed=lambda: Observed(verified_by="MIL program evaluated off-device"),
    )


def load_on_mac(path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
    """Run it with Core ML.

    Raises:
        CannotRun: this is not macOS.
    """
    if sys.platform != "darwin":
        raise CannotRun("Core ML is part of macOS, so run this on a Mac")
    return package(_predicted(path), spec)


def intermediates(path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
    """The output of each operation of the program, evaluated off-device."""
    import torch

    from polyexport.coreml.evaluate import intermediates

    torch.set_num_threads(threads)
    own = as_core_ml(spec)
    values = intermediates(path)(as_given(inputs, spec, own))
    return {name: array.astype(np.float32) for name, array in values.items() if name not in own.input_names}


def package(run: Runner, spec: ExportSpec) -> Loaded:
    """A package that `run` runs under its own names and dtypes, with PyTorch's names and dtypes.

    Outputs of another kind than PyTorch's are returned unchanged, for parity to see.
    """
    own = as_core_ml(spec)
    outputs = tuple(zip(spec.outputs, own.outputs, strict=True))
    pairs = (*zip(spec.inputs, own.inputs, strict=True), *outputs)
    renamed = ", ".join(f"{our.name} is {its.name}" for our, its in pairs if our.name != its.name)

    def renaming(arrays: Arrays) -> Arrays:
        answer = run(as_given(arrays, spec, own))
        return {our.name: _returned(answer[its.name], its.dtype, our.dtype) for our, its in outputs}

    return Loaded(renaming, own, shortfall=f"names that Core ML does not allow: {renamed}" if renamed else "")


def as_given(arrays: Arrays, spec: ExportSpec, own: ExportSpec) -> Arrays:
    """PyTorch's inputs with the package's names and dtypes."""
    pairs = zip(spec.inputs, own.inputs, strict=True)
    return {its.name: np.atleast_1d(arrays[our.name].astype(its.dtype)) for our, its in pairs}


def _returned(array: np.ndarray, there: str, own: str) -> np.ndarray:
    return array.astype(own) if array.dtype.kind == np.dtype(there).kind else array


def _predicted(path: Path) -> Runner:
    import coremltools as ct

    run: Runner = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY).predict
    return run


def _evaluated(path: Path, threads: int) -> Runner:
    import torch

    from polyexport.coreml.evaluate import evaluator

    torch.set_num_threads(threads)
    with _advising():
        run = evaluator(path)

    def advised(inputs: Arrays) -> Arrays:
        with _advising():
            return run(inputs)

    return advised


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Say where a program can be run that cannot be evaluated here."""
    try:
        yield
    except CannotRun as error:
        raise CannotRun(f"{error}; a kit verifies it on a Mac: `polyexport kit EXPORT/coreml`") from error


def _in(precision: str, convert: Callable[..., None]) -> Convert:
    def converted(source: Path, target: Path, spec: ExportSpec) -> None:
        convert(source, target, spec, precision=precision)

    return converted


_SNIPPETS = (
    Snippet(
        "Swift",
        """\
import CoreML

let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: "{{ path }}"))
let model = try MLModel(contentsOf: compiled)
let inputs = try MLDictionaryFeatureProvider(dictionary: [
{%- for input in inputs %}
{%- set kind = {"float16": "Float16", "float32": "Float"}.get(input.dtype, "Int32") %}
  {{ input.name | tojson }}: MLFeatureValue(shapedArray: MLShapedArray<{{ kind }}>(  // your data here
    scalars: [{{ kind }}](repeating: 0, count: {{ input.shape | join(" * ") or 1 }}),
    shape: {{ input.shape | list | tojson }})),
{%- endfor %}
])
let outputs = try await model.prediction(from: inputs)
{%- for name in outputs %}
let output{{ loop.index0 }} = outputs.featureValue(for: {{ name | tojson }})?.multiArrayValue
{%- endfor %}
""",
    ),
)


def coreml_format(name: str, precision: Precision, description: str, *routes: Route, **more: Any) -> Format:
    """A format whose artifact is such a package."""
    return Format(
        name=name,
        description=description,
        url="https://apple.github.io/coremltools/docs-guides/",
        artifact="model.mlpackage",
        graph="model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        precision=precision,
        routes=routes,
        targets=("phone",),
        snippets=_SNIPPETS,
        on_device=OnDevice(("coremltools",), load_on_mac),
        **({"load": load, "intermediates": intermediates} | more),
    )


def _translations(precision: str) -> tuple[Route, ...]:
    return (
        Route("trace", "torchscript", "coreml", _in(precision, convert_trace)),
        Route("torch.export", "pt2", "coreml", _in(precision, convert_program)),
    )


FORMATS = (
    coreml_format("coreml", "float32", "Core ML program, for Apple's CPUs and GPUs", *_translations("float32")),
    coreml_format(
        "coreml-fp16",
        "float16",
        "Core ML program in half precision, for Apple's Neural Engine",
        *_translations("float16"),
    ),
)
