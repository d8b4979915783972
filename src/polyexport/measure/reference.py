"""The reference: what the untouched checkpoint answers on the validation batch, and on two further batch sizes.

Runs in a worker. Everything that the later steps have to know about the model is found out here, by running it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture import sharded
from polyexport.capture import snapshot as modules
from polyexport.capture.flatten import as_runner, to_arrays
from polyexport.errors import BadRequest
from polyexport.format import Runner, Tolerance
from polyexport.measure.noise import rounding
from polyexport.measure.parity import compare
from polyexport.spec import Arrays, ExportSpec, TensorSpec, write_arrays
from polyexport.tracing.decompositions import plain_attention
from polyexport.versions import environment
from polyexport.workers.job import Batch

if TYPE_CHECKING:
    import torch

Dynamic = bool | Mapping[str, Mapping[int, str]]
"""Which input axes are free: True for the batch axis, False for none, or input name -> {axis: name}."""

BATCH = "batch"
VALIDATION_BATCH = "validation_batch.npz"
NOISE = "source/noise.npz"


@dataclass(frozen=True, slots=True)
class Reference:
    """What the worker found out about the model.

    `checkpoint_at` has the `epoch` and `global_step` that stand in the checkpoint, where they do.
    `noise` is the file with the noise floor of each element of the validation batch's outputs, as far as it is known.
    `static_because` is set when a dynamic axis was asked for that the module itself cannot do, `undecidable` when it
    does not agree with itself.
    """

    spec: ExportSpec
    class_name: str
    parameters: int
    checkpoint_sha256: str
    checkpoint_at: Mapping[str, int]
    batches: tuple[Batch, ...]
    noise: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    static_because: str = ""
    undecidable: str = ""
    notes: tuple[str, ...] = ()


def make(root: Path, source: Path, dynamic: Dynamic, commit: str = "", *, sha256: str = "") -> Reference:
    """Run the module of `source`; write `validation_batch.npz`, further batches and the example to trace with.

    `commit` is the code's, of which this machine need not have a repository; `sha256` the checkpoint's, where the
    weights are not the checkpoint itself.

    Raises:
        BadRequest: the module cannot be rebuilt, or its inputs cannot be fed to a converter.
        ToolMissing: the checkpoint is in shards, and what joins them is not installed.
    """
    import torch

    weights = source / modules.WEIGHTS
    if (source / modules.SHARDS).exists():
        sharded.join(source / modules.SHARDS, weights)
    model = modules.load(source)
    sha256, at = sha256 or _sha256(weights), _keep_only_weights(weights)
    model_any: Any = model
    own = _on_copies(as_runner(model))
    run = plain_attention()(own)
    inputs = to_arrays(model_any.input_names, model_any.example)
    outputs = run(inputs)
    again = compare(run(inputs), outputs, Tolerance.for_precision("float32"))
    undecidable = "" if again.passed else f"forward answers two calls differently in eval mode ({again.reason})"
    notes: list[str] = []
    if any(isinstance(each, torch.nn.TransformerEncoder) for each in model.modules()):
        notes += _fused_apart(own(inputs), outputs)
    notes += [f"output {name} is left out: no tensor, dict, tuple or dataclass" for name in model_any.dropped]
    axes = _axes(inputs, dynamic)
    sizes = _sizes(inputs, axes)
    further, why_not = _further(run, inputs, outputs, axes, sizes)
    if why_not:
        axes, sizes = {}, {}
    described, own_sizes = _describe_outputs(outputs, sizes, further)
    spec = ExportSpec(
        inputs=tuple(_describe(name, array, axes.get(name, {})) for name, array in inputs.items()),
        outputs=described,
        sizes=sizes | own_sizes,
    )
    about = environment()
    further_inputs, note = _calibration(root, source, model_any.input_names, inputs)
    notes += note
    spec = replace(_with_metadata(spec, sha256, commit, about), calibration=(Path(VALIDATION_BATCH), *further_inputs))
    batches = [Batch(VALIDATION_BATCH, sizes)]
    write_arrays(root / VALIDATION_BATCH, inputs | outputs)
    for index, (batch_sizes, batch) in enumerate(further):
        batches.append(Batch(f"source/batch_{index + 1}.npz", batch_sizes))
        write_arrays(root / batches[-1].path, batch)
    write_arrays(source / "example.npz", resized(inputs, axes, {name: max(2, size) for name, size in sizes.items()}))
    noise, how = rounding(model, inputs, outputs)
    write_arrays(root / NOISE, noise)
    return Reference(
        spec=spec,
        class_name=_class_name(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        checkpoint_sha256=sha256,
        checkpoint_at=at,
        batches=tuple(batches),
        noise=NOISE,
        environment=about | {"git_commit": commit, "threads": str(torch.get_num_threads())},
        static_because=why_not,
        undecidable=undecidable,
        notes=(*notes, *([how] if how else [])),
    )


def eager(source: Path, *, threads: int) -> Runner:
    """PyTorch itself, as a runtime like the others."""
    import torch

    torch.set_num_threads(threads)
    return as_runner(modules.load(source))


def _calibration(root: Path, source: Path, names: Sequence[str], inputs: Arrays) -> tuple[list[Path], tuple[str, ...]]:
    """Write the inputs of further saved calls; those that are not of the first one's kind are left out."""
    written: list[Path] = []
    calls = modules.further_calls(source)
    for call in calls:
        tensors = modules.call_tensors(call)
        alike = len(tensors) == len(names)
        arrays = to_arrays(names, tensors) if alike else {}
        if alike and all((a.dtype, a.ndim) == (inputs[name].dtype, inputs[name].ndim) for name, a in arrays.items()):
            written.append(Path("source", call.with_suffix(".npz").name))
            write_arrays(root / written[-1], arrays)
    lost = len(calls) - len(written)
    return written, (f"{lost} of {len(calls)} calibration batches are not like the first and are left out",) * bool(
        lost
    )


def _fused_apart(fused: Arrays, outputs: Arrays) -> list[str]:
    """A note where PyTorch's fused path for transformers answers otherwise, as it does at masked positions."""
    apart = compare(fused, outputs, Tolerance.for_precision("float32"))
    if apart.passed:
        return []
    return [
        "PyTorch's fused path for nn.TransformerEncoder answers otherwise where a padding mask masks (zeros); "
        f"the reference is its plain path, the one that was trained: {apart.reason}"
    ]


def _on_copies(run: Runner) -> Runner:
    """For a forward that changes its inputs in place, which are those of later calls too."""
    return lambda inputs: run({name: array.copy() for name, array in inputs.items()})


# --- dynamic axes -----------------------------------------------------------------------------------------------------

Axes = Mapping[str, Mapping[int, str]]


def _axes(inputs: Arrays, dynamic: Dynamic) -> Axes:
    """Input name -> {axis: name}, for the axes that are to be free."""
    if isinstance(dynamic, Mapping):
        for name, axes in dynamic.items():
            if name not in inputs:
                raise BadRequest(f"dynamic names the input {name!r}; forward received {', '.join(inputs)}")
            for axis in axes:
                if not -inputs[name].ndim <= int(axis) < inputs[name].ndim:
                    raise BadRequest(f"dynamic names axis {axis} of {name}, which has {inputs[name].ndim} axes")
        return {
            name: {int(axis) % inputs[name].ndim: called for axis, called in axes.items()}
            for name, axes in dynamic.items()
        }
    leading = [array.shape[0] for array in inputs.values() if array.ndim]
    if not dynamic or not leading:
        return {}
    return {name: {0: BATCH} for name, array in inputs.items() if array.ndim and array.shape[0] == leading[0]}


def _sizes(inputs: Arrays, axes: Axes) -> dict[str, int]:
    """Size of each named axis in the validation batch."""
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        for axis, called in named.items():
            size = inputs[name].shape[axis]
            if sizes.setdefault(called, size) != size:
                raise BadRequest(f"dynamic: {called!r} is {sizes[called]} in one input and {size} in {name}")
    return sizes


def resized(inputs: Arrays, axes: Axes, sizes: Mapping[str, int]) -> Arrays:
    """The same inputs at other sizes: rows are taken in turn, so that every row is a real one."""
    batch = dict(inputs)
    for name, named in axes.items():
        for axis, called in named.items():
            rows = np.arange(sizes[called]) % inputs[name].shape[axis]
            batch[name] = np.take(batch[name], rows, axis)
    return batch


def _candidates(axes: Axes, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try beside those of the validation batch: small batches, other axes doubled, halved and as they are.

    At last greater ones: the nodes of a graph may grow, but not vanish under its edges.
    """
    leading = {called for named in axes.values() for axis, called in named.items() if axis == 0}
    scales: tuple[Callable[[int], int], ...] = (lambda n: 2 * n, lambda n: max(n // 2, 1), lambda n: n)
    candidates = [
        {called: rows if called in leading else scale(size) for called, size in sizes.items()}
        for index, rows in enumerate((1, 3, 2, 5))
        for scale in (scales[index:] if len(leading) < len(sizes) else scales[2:])
    ]
    for more in (1, 2):  # not twice as many, which a fixed batch may happen to divide
        candidates.append({called: size + more if called in leading else size for called, size in sizes.items()})
    yielded = [dict(sizes)]
    for tried in candidates:
        if tried not in yielded:
            yielded.append(tried)
            yield tried


def _further(
    run: Runner, inputs: Arrays, outputs: Arrays, axes: Axes, sizes: Mapping[str, int]
) -> tuple[list[tuple[dict[str, int], Arrays]], str]:
    """Two further batches with their reference outputs, or the reason why the module itself cannot run them."""
    found: list[tuple[dict[str, int], Arrays]] = []
    why = ""
    for tried in _candidates(axes, sizes):
        batch = resized(inputs, axes, tried)
        where = ", ".join(f"{name}={size}" for name, size in tried.items())
        try:
            answer = run(batch)
        except Exception as error:  # forward is the user's; whatever it raises at this size means that it cannot do it
            why = f"PyTorch itself fails at {where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        ranks = {name: (array.ndim, outputs[name].ndim) for name, array in answer.items() if name in outputs}
        if answer.keys() != outputs.keys() or any(here != there for here, there in ranks.values()):
            why = f"PyTorch itself returns outputs of another rank at {where}"
            continue
        found.append((tried, batch | answer))
        if len(found) == 2:
            break
    return (found, "") if found or not sizes else ([], why)


def _describe(name: str, array: np.ndarray, named: Mapping[int, str]) -> TensorSpec:
    return TensorSpec(name, str(array.dtype), tuple(named.get(axis, size) for axis, size in enumerate(array.shape)))


def _describe_outputs(
    outputs: Arrays, sizes: Mapping[str, int], further: Sequence[tuple[Mapping[str, int], Arrays]]
) -> tuple[tuple[TensorSpec, ...], dict[str, int]]:
    """Outputs with the axes named that changed with the batch, and the sizes of those that follow no input axis."""
    described, own = [], {}
    for name, array in outputs.items():
        named: dict[int, str] = {}
        for axis, size in enumerate(array.shape):
            seen = [(size, sizes), *((batch[name].shape[axis], at) for at, batch in further)]
            if len({found for found, _ in seen}) == 1:
                continue
            follows = [called for called in sizes if all(found == at[called] for found, at in seen)]
            named[axis] = follows[0] if follows else f"{name}_axis_{axis}"
            if not follows:
                own[named[axis]] = size
        described.append(_describe(name, array, named))
    return tuple(described), own


# --- the rest ---------------------------------------------------------------------------------------------------------


def _with_metadata(spec: ExportSpec, sha256: str, commit: str, about: Mapping[str, str]) -> ExportSpec:
    signature = {"inputs": "; ".join(map(str, spec.inputs)), "outputs": "; ".join(map(str, spec.outputs))}
    versions = {name: version for name, version in about.items() if name in ("lightning-export", "torch", "lightning")}
    return replace(spec, metadata={"checkpoint_sha256": sha256, "git_commit": commit, **signature, **versions})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_only_weights(path: Path) -> dict[str, int]:
    """Replace a checkpoint by its state dict, since optimizer states serve no export; returns when it was made."""
    import torch

    blob = modules.read_checkpoint(path)
    temporary = path.with_suffix(".tmp")
    torch.save(blob.get("state_dict", blob), temporary)
    at = {key: blob[key] for key in ("epoch", "global_step") if isinstance(blob.get(key), int)}
    del blob  # Windows replaces no file that is mapped into memory
    temporary.replace(path)
    return at


def _class_name(model: torch.nn.Module) -> str:
    inner = getattr(model, "inner", model)
    return f"{type(inner).__module__}.{type(inner).__qualname__}"
