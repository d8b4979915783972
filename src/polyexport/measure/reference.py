"""The reference: PyTorch's outputs with the checkpoint on the validation batch, at other sizes and on other values.

Runs in a worker. All that later steps need to know about the model is found here, by running it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import pickle
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyexport.capture import sharded, snapshot, surroundings
from polyexport.capture.answer import NotCompared, disagreement, left_as_it_is, other_buffers, recorded
from polyexport.capture.calls import call_file, call_tensors, further_calls
from polyexport.capture.changes import beside_weights
from polyexport.capture.dtypes import fails, needs_float32
from polyexport.capture.flatten import as_runner, to_arrays
from polyexport.capture.pickling import dump, restore
from polyexport.capture.unwrap import has_fake_quantization
from polyexport.capture.weights import SHARDS, WEIGHTS, read_checkpoint
from polyexport.errors import BadRequest, line
from polyexport.measure import dynamic_axes, remarks
from polyexport.measure.batches import Answered, Batches, gather
from polyexport.measure.constants import frozen
from polyexport.measure.dynamic_axes import Dynamic, resized
from polyexport.measure.noise import rounding
from polyexport.measure.other_values import changed
from polyexport.measure.parity import NARROW, compare, says_little
from polyexport.measure.tolerance import Tolerance
from polyexport.serialization import writing
from polyexport.spec import Arrays, Batch, ExportSpec, Runner, write_arrays
from polyexport.tracing.attention import plain_attention
from polyexport.tracing.draws import Draws, advice, draws, lines
from polyexport.tracing.forward import uncompiled
from polyexport.tracing.idle_reads import idle
from polyexport.tracing.reads import named, site_of
from polyexport.versions import environment

if TYPE_CHECKING:
    import torch

VALIDATION_BATCH = "validation_batch.npz"
NOISE = "source/noise.npz"


@dataclass(frozen=True, slots=True)
class Reference:
    """What running the model has shown.

    Attributes:
        spec: The signature.
        class_name: The module's class, with its module.
        parameters: Number of parameters.
        checkpoint_sha256: SHA-256 of the checkpoint file.
        checkpoint_at: The `epoch` and `global_step` of the checkpoint, if it has them.
        batches: The batches to verify artifacts with, the validation batch first.
        noise: The file with the noise floor of each element of the validation batch's outputs, if known.
        environment: Versions, commit and threads.
        static_because: Why no axis is dynamic although one was asked for; else empty.
        undecidable: Why nothing can be verified, since PyTorch does not agree with itself; else empty.
        read_at: The lines (`file:line`) at which forward reads numbers or booleans of its inputs into Python.
        one_side: Those lines at which every batch took the same branch.
        empty_at: The lines at which a selection by values, such as `x[mask]`, had no elements for some batch.
        narrow: Why artifacts are right for some data only, because of arguments that are not tensors; else empty.
        unlabeled: Why the user's labels are in no artifact; else empty.
        notes: Notes for the report.
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
    read_at: tuple[str, ...] = ()
    one_side: tuple[str, ...] = ()
    empty_at: tuple[str, ...] = ()
    narrow: str = ""
    unlabeled: str = ""
    notes: tuple[str, ...] = ()


@uncompiled()
def make(root: Path, source: Path, dynamic: Dynamic, commit: str = "", *, sha256: str = "") -> Reference:
    """Run the module of `source`, and write `validation_batch.npz`, further batches and the example to trace with.

    `commit` is the git commit of the code, whose repository this machine may not have; `sha256` is the checkpoint's, if
    the weights are not in the checkpoint file itself.

    Raises:
        BadRequest: forward raises, or its inputs cannot be passed to a converter.
        ToolMissing: the checkpoint is sharded, and the package that joins shards is not installed.
    """
    import torch

    model, hashed, at = _loaded(source)
    sha256, about = sha256 or hashed, environment()
    inner = getattr(model, "inner", model)
    before = beside_weights(inner)
    unlike_trained, as_trained = _as_trained(source, model)
    own = _on_copies(as_runner(model))
    run = plain_attention()(own)
    inputs = to_arrays(model.input_names, model.example)
    outputs, drawn_before = _answered(run, inputs), _generators()
    again, by_python = _seeded(run, 1)(inputs), drawn_before != _generators()
    keeps = beside_weights(inner) != before
    of_model = remarks.of_the_model(model, own, inputs, outputs)
    others, of_batches = _other_batches(source, model.input_names, inputs)
    proofs = gather(model, run, inputs, outputs, others, dynamic)
    spec = _spec(root, inputs, outputs, others, proofs)
    write_arrays(source / "example.npz", _example(inputs, proofs))
    drawn = plain_attention()(draws)(model, [each.arrays for each in proofs.batches])
    later = itertools.chain([again], _in_between(run, inputs), _seen_later(source, inputs) if keeps else ())
    undecidable = _undecidable(outputs, later, drawn) or _unlike(unlike_trained, drawn)
    unused = plain_attention()(idle)(model, inputs, proofs.tried.one_side())
    _write(source / snapshot.IDLE, unused.values)
    _write(source / snapshot.DRAWS, drawn if drawn.known else None)
    _mark(source / snapshot.GUARDS, proofs.tried.guards)
    further = tuple(others.values())
    narrow = frozen(source, model, outputs, spec, further, lambda run: plain_attention()(_on_copies(run)))
    noise, how = _noise(model, inputs, outputs, drawn)
    write_arrays(root / NOISE, noise)
    return Reference(
        spec=replace(_with_metadata(spec, sha256, commit, about), has_trained_scales=has_fake_quantization(model)),
        class_name=_class_name(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        checkpoint_sha256=sha256,
        checkpoint_at=at,
        batches=_written_batches(root, proofs.batches),
        noise=NOISE,
        environment=about | {"git_commit": commit, "threads": str(torch.get_num_threads())},
        static_because=proofs.static_because,
        undecidable=undecidable,
        read_at=tuple(site for site in proofs.tried.values if site not in unused.values),
        one_side=tuple(site for site in proofs.tried.one_side() if site not in unused.values),
        empty_at=tuple(sorted({site for site, size in proofs.tried.counts if not size})),
        narrow=narrow.narrow,
        notes=(
            *remarks.in_float32(model),
            *as_trained,
            *of_model,
            *remarks.drawn(drawn, by_python, decidable=not undecidable),
            *of_batches,
            *remarks.fixed_though_varying(inputs, others, proofs.axes, dynamic),
            *remarks.as_in_training(model.input_names, model.output_names),
            *says_little(outputs),
            *remarks.unchecked(unused.checks),
            *narrow.notes,
            *remarks.paired(model),
            *(
                f"output {name} is float32 in artifacts, since numpy lacks its dtype in PyTorch"
                for name in model.widened
            ),
            *([how] if how else []),
        ),
    )


def _answered(run: Runner, inputs: Arrays) -> Arrays:
    """PyTorch's outputs.

    Raises:
        BadRequest: forward raises.
    """
    try:
        return run(inputs)
    except BadRequest:
        raise
    except Exception as error:  # forward is the user's, and may raise anything
        at = f" at {named({site})}" if (site := site_of(error)) else ""
        raise BadRequest(f"forward, in eval mode and on the CPU, raises{at}: {line(error)}") from error


def below(reference: Reference, home: str) -> Reference:
    """The reference with `home` in front of the paths of its files."""
    batches = tuple(replace(batch, path=Path(home, batch.path).as_posix()) for batch in reference.batches)
    calibration = tuple(home / path for path in reference.spec.calibration)
    noise, spec = Path(home, reference.noise).as_posix(), replace(reference.spec, calibration=calibration)
    return replace(reference, batches=batches, noise=noise, spec=spec)


def _write(path: Path, found: Any) -> None:
    """Write what was found, if there is anything."""
    path.unlink(missing_ok=True)  # one that is resumed may have it
    if found:
        dump(found, path)


def _mark(path: Path, is_so: bool) -> None:
    """Leave an empty file at `path`, or none."""
    path.unlink(missing_ok=True)  # one that is resumed may have it
    if is_so:
        path.touch()


def _noise(model: Any, inputs: Arrays, outputs: Arrays, drawn: Draws) -> tuple[Arrays, str]:
    """The noise floor of the outputs, as it is stored on disk, and a note on how it was found, which may be empty."""
    why = f"forward draws random numbers ({lines(drawn.all)}), other ones in float64" if drawn.all else ""
    noise, how = rounding(model, inputs, outputs, not_double=why)
    return {**noise, **{name + NARROW: np.ones(()) for name in model.widened}}, how


def _loaded(source: Path) -> tuple[Any, str, Mapping[str, int]]:
    """The flat module, the SHA-256 of its checkpoint, and the checkpoint's epoch and step."""
    weights = source / WEIGHTS
    if (source / SHARDS).exists():
        sharded.join(source / SHARDS, weights)
    sha256, at = _sha256(weights), _keep_only_weights(weights)
    return _loaded_in_float32(source), sha256, at


def _loaded_in_float32(source: Path) -> Any:
    """The flat module; see `polyexport.capture.dtypes`."""
    import torch

    marker = source / snapshot.IN_FLOAT32
    marker.unlink(missing_ok=True)  # one that is resumed may have it
    model = snapshot.load(source)
    if isinstance(model, torch.fx.GraphModule):  # a trace, which is in float32 already
        return model
    with left_as_it_is(model):
        if not needs_float32(model):
            return model
        marker.touch()
        without_casts = snapshot.load(source)
        with left_as_it_is(without_casts):
            if not fails(without_casts):
                return without_casts
    marker.unlink()
    return model


def _generators() -> tuple[Any, bytes]:
    """The states of Python's generator and numpy's."""
    return random.getstate(), pickle.dumps(np.random.get_state())


def _as_trained(source: Path, model: Any) -> tuple[str, tuple[str, ...]]:
    """Why nothing can be verified, if the module returned other outputs in training with the same weights; and notes.

    If global variables of the user's files make the difference, they are set to their values in training.
    """
    try:
        why = _disagreement(source, model)
    except NotCompared as error:
        return "", (f"not compared with the outputs in training: {error}",)
    if not why:
        return "", ()
    names: list[str] = []
    if (source / surroundings.OFFERED).exists():
        names = surroundings.put_back(restore(source / surroundings.OFFERED))
    if names and not _disagreement(source, model):
        surroundings.accept(source)
        return "", (f"global variables were set to their values in training: {', '.join(names)}",)
    return f"the module rebuilt in a worker returns other outputs than in training ({why}): {_because(source)}", ()


def _because(source: Path) -> str:
    """What may make the difference to training."""
    there = recorded(source)
    if there.training:
        return (
            "the module, or a part of it, was in training mode in that call, and artifacts are of eval mode, which "
            "Lightning sets before validation; does validation_step, or a hook, call self.train()?"
        )
    if there.hooked:
        return (
            "hooks on all modules (torch.nn.modules.module.register_module_forward_hook) were registered in that call, "
            "and artifacts have only those of the module and its parts"
        )
    if there.changed:
        return (
            "attributes, layers or buffers changed after that call, as a temperature in on_validation_epoch_end does; "
            "they are exported as they were at the checkpoint, for which polyexport.export(module, inputs, …) after "
            "fit has outputs to compare with"
        )
    if moved := other_buffers(source):
        return (
            f"buffers ({', '.join(moved[:3])}) had other values in that call than in the checkpoint, as where each "
            "validation batch changes them; artifacts have the checkpoint's, for which polyexport.export(module, "
            "inputs, …) after fit has outputs to compare with"
        )
    return "forward depends on something that is neither in the checkpoint nor an attribute of the module"


def _disagreement(source: Path, model: Any) -> str:
    """How the outputs differ from those in training, with PyTorch's fused path for transformers or without it.

    It is run twice, since the fused path is not taken while `devices.OnTheCpu` is active, which ends once a call has
    shown that forward names no device.
    """
    return (
        disagreement(source, model) and disagreement(source, model) and plain_attention()(disagreement)(source, model)
    )


def _undecidable(outputs: Arrays, later: Iterable[Arrays], drawn: Draws) -> str:
    """Why nothing can be verified, if later calls with the same inputs return other outputs; else empty."""
    because = "because of random numbers, or of a state that it keeps, which would have to be an input and an output"
    if drawn.unseeded:
        because = f"it draws random numbers without a seed ({lines(drawn.unseeded)}; {advice(drawn.unseeded)})"
    for answer in later:
        found = compare(answer, outputs, Tolerance.for_precision("float32"))
        if not found.passed:
            return f"forward returns different outputs for the same inputs in eval mode: {because} ({found.reason})"
    return ""


def _unlike(trained: str, drawn: Draws) -> str:
    """Why nothing can be verified, if the outputs in training were others, as `trained` says; else empty."""
    if trained and drawn.unseeded:
        where = f"{lines(drawn.unseeded)}; {advice(drawn.unseeded)}"
        return f"forward draws random numbers without a seed ({where}), and did so in training too"
    return trained


def _in_between(run: Runner, inputs: Arrays) -> Iterator[Arrays]:
    """Outputs for the same inputs after all previous runs, and again after a run with other inputs."""
    yield run(inputs)
    for _, values in itertools.islice(changed(inputs), 1):
        with contextlib.suppress(Exception):  # forward is the user's, and may not take them
            run(values)
        yield _seeded(run, 2)(inputs)


def _seen_later(source: Path, inputs: Arrays) -> Iterator[Arrays]:
    """Outputs of the module, loaded anew, for inputs that are not the first that it sees: it may keep those."""
    run = plain_attention()(_on_copies(as_runner(_loaded_in_float32(source))))
    for _, values in itertools.islice(changed(inputs), 1):
        with contextlib.suppress(Exception):  # as above
            run(values)
        yield run(inputs)


def _seeded(run: Runner, seed: int) -> Runner:
    """A runner that finds PyTorch's default generator in a state of its own."""
    import torch

    def seeded(inputs: Arrays) -> Arrays:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return run(inputs)

    return seeded


def _written_batches(root: Path, batches: Sequence[Answered]) -> tuple[Batch, ...]:
    paths = [VALIDATION_BATCH, *(f"source/batch_{index}.npz" for index in range(1, len(batches)))]
    return tuple(
        Batch(_written(root, path, each.compared).as_posix(), each.sizes, each.label, each.real)
        for path, each in zip(paths, batches, strict=True)
    )


def _written(root: Path, path: str, arrays: Arrays) -> Path:
    """Write a batch to `path`, relative to `root`; returns `path`."""
    write_arrays(root / path, arrays)
    return Path(path)


def _call_arrays(index: int) -> str:
    """The file with the inputs of a further call as arrays."""
    return call_file(Path("source"), index).with_suffix(".npz").as_posix()


def _spec(root: Path, inputs: Arrays, outputs: Arrays, others: Mapping[int, Arrays], proofs: Batches) -> ExportSpec:
    """The signature; writes the batches for calibration."""
    further = [(each.sizes, each.arrays) for each in proofs.batches[1:]]
    described, own_sizes = dynamic_axes.describe_outputs(outputs, proofs.sizes, further)
    return ExportSpec(
        inputs=tuple(dynamic_axes.describe(name, array, proofs.axes.get(name, {})) for name, array in inputs.items()),
        outputs=described,
        sizes={**proofs.sizes, **own_sizes},
        calibration=(Path(VALIDATION_BATCH), *(_written(root, _call_arrays(index), others[index]) for index in others)),
    )


def _example(inputs: Arrays, proofs: Batches) -> Arrays:
    """Inputs to trace with: at least 2 along each dynamic axis, since a tracer takes a size of 1 for a constant."""
    return resized(inputs, proofs.axes, {name: max(2, size) for name, size in proofs.sizes.items()})


def _other_batches(source: Path, names: Sequence[str], inputs: Arrays) -> tuple[dict[int, Arrays], tuple[str, ...]]:
    """The inputs of further saved calls, by index; those with other arguments than the first are left out."""
    alike: dict[int, Arrays] = {}
    calls = further_calls(source)
    for call in calls:
        tensors = call_tensors(call)
        arrays = to_arrays(names, tensors) if len(tensors) == len(names) else {}
        if arrays and all((a.dtype, a.ndim) == (inputs[name].dtype, inputs[name].ndim) for name, a in arrays.items()):
            alike[int(call.stem.removeprefix("call_"))] = arrays
    lost = len(calls) - len(alike)
    return alike, (
        f"{lost} of {len(calls)} further batches have other arguments than the first, and are left out",
    ) * bool(lost)


def eager(source: Path, *, threads: int) -> Runner:
    """PyTorch itself, as a runtime like the others."""
    import torch

    torch.set_num_threads(threads)
    return as_runner(snapshot.load(source))


def _on_copies(run: Runner) -> Runner:
    """A runner on copies of the inputs, since forward may change them in place."""
    return lambda inputs: run({name: array.copy() for name, array in inputs.items()})


def _with_metadata(spec: ExportSpec, sha256: str, commit: str, about: Mapping[str, str]) -> ExportSpec:
    signature = {"inputs": "; ".join(map(str, spec.inputs)), "outputs": "; ".join(map(str, spec.outputs))}
    versions = {name: version for name, version in about.items() if name in ("lightning-export", "torch", "lightning")}
    return replace(spec, metadata={"checkpoint_sha256": sha256, "git_commit": commit, **signature, **versions})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_only_weights(path: Path) -> dict[str, int]:
    """Replace a checkpoint by its state dict, since optimizer states are not needed; returns its epoch and step."""
    import torch

    blob = read_checkpoint(path)
    if "state_dict" not in blob:  # and is not copied
        return {}
    with writing(path) as file:
        torch.save(blob["state_dict"], file)
        at = {key: blob[key] for key in ("epoch", "global_step") if isinstance(blob.get(key), int)}
        del blob  # Windows cannot replace a file that is mapped into memory
    return at


def _class_name(model: torch.nn.Module) -> str:
    core = getattr(model, "core", model)
    return f"{type(core).__module__}.{type(core).__qualname__}"
