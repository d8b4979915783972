"""The concepts of a format: what it is, the routes that make it, and how an artifact is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from polyexport.errors import BadRequest, CannotRun
from polyexport.measure.emulator import Emulator
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import PRECISIONS, Arrays, ExportSpec, Precision, Runner

if TYPE_CHECKING:
    from polyexport.workers.toolchain import Toolchain


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a runtime after its first call.

    Attributes:
        verified_by: What ran the artifact, if it was not simply its own runtime, such as a stand-in or one of several
            backends.
        device: What it runs on, as `Latency.device`.
        first_ms: Time of the first call in milliseconds, if the caller could not measure it; else None.
        peak_memory_bytes: Peak resident memory of the runtime's process, if that is not the caller's; else None.
    """

    verified_by: str | None = None
    device: str = "cpu"
    first_ms: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact loaded in its runtime, with what the report says of it; calling it calls `run`.

    Attributes:
        run: Runs it on inputs under PyTorch's names, and returns the outputs under PyTorch's names.
        signature: The artifact's own signature; None if it is PyTorch's.
        shortfall: What it lacks of what was asked for, in a line; empty if nothing.
        remark: What else a reader should know of it, such as which operators stay in float; or empty.
        emulator: A further processor, which verification tries too.
        stand_in: Why `run` is not the artifact's own runtime, and so is not timed; empty if it is.
        observed: Returns what is known after `run` was called.
        others: Other runtimes by which applications run it, by name, each with what opens it. They are verified too,
            and are not timed; it is a shortfall if one disagrees or refuses it.
        labels: The labels that are embedded in it.
        metadata: The metadata that is embedded in it: the user's, the checkpoint's hash, versions.
    """

    run: Runner
    signature: ExportSpec | None = None
    shortfall: str = ""
    remark: str = ""
    emulator: Emulator | None = None
    stand_in: str = ""
    observed: Callable[[], Observed] = Observed
    others: Mapping[str, Callable[[], Runner]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the artifact."""
        return self.run(inputs)


Convert = Callable[[Path, Path, ExportSpec], None]
"""`convert(source, target, spec)`: read the upstream artifact at `source`, write the artifact to `target`."""

MODULE = "module"
"""The upstream of a route that reads no other format: the folder of the module (`polyexport.capture.snapshot.load`)."""


class Load(Protocol):
    """How a format loads an artifact."""

    def __call__(self, path: Path, spec: ExportSpec, *, threads: int) -> Runner | Loaded:
        """Load the artifact at `path` for CPU inference with `threads` threads.

        A plain function is enough if the report has nothing more to say of it.

        Raises:
            CannotRun: nothing on this machine can run it.
        """


class Intermediates(Protocol):
    """How a format reads the intermediate tensors of an artifact."""

    def __call__(self, path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
        """Run the artifact at `path` on PyTorch's named inputs.

        Returns:
            Each float tensor that depends on the inputs, by the artifact's own names, in the order of computation;
            quantized ones dequantized, all in float32. Constants are left out.
        """


@dataclass(frozen=True, slots=True)
class Route:
    """One way to make a format. Routes are tried in order until an artifact agrees with PyTorch.

    Attributes:
        name: Its name in the report.
        upstream: What `convert` reads: `"module"`, or the name of another format.
        toolchain: What `convert` runs in: the name of a requirement file in `toolchains/`, or a `Toolchain`.
        convert: Writes the artifact.
        static: Whether it takes static shapes only; it is then not tried with dynamic axes.
        trained: Whether it uses the scales that the model was trained with, instead of calibration; it is then tried
            only with models that were trained with fake quantization.
        completes: Whether such a route calibrates the scales that training left out.
        mends: Whether it follows `ExportSpec.in_float`, so that a missed budget can be met with more layers in float.
    """

    name: str
    upstream: str
    toolchain: str | Toolchain
    convert: Convert
    static: bool = False
    trained: bool = False
    completes: bool = False
    mends: bool = False


def trained_routes(toolchain: str, convert: Callable[..., None], *, static: bool = False) -> tuple[Route, Route]:
    """The route for models with all of their scales from training, and one that calibrates those that are missing.

    `convert` takes the argument `calibrated`; if that is false, it fails where a scale is missing.
    """
    route = Route("trained scales", "pt2", toolchain, convert, static=static, trained=True)
    completed = partial(convert, calibrated=True)
    return route, replace(route, name="trained and calibrated scales", convert=completed, completes=True)


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code with which an application loads and runs the artifact, shown by the report page.

    `code` is a jinja2 template of `path` and `batch`, the paths of the artifact and of the batch that it is verified
    with, relative to the export's folder, in which the code is run; `inputs`, `TensorSpec`s whose dynamic axes are 1;
    `names` and `outputs`, the names of inputs and outputs; `output_dtypes` and `output_shapes`.
    """

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class OnDevice:
    """How an artifact is run on the machine that it is made for, which has only its runtime (see `polyexport kit`).

    Attributes:
        packages: What `pip` installs there besides numpy; the first is the runtime, whose version the report has.
        load: Loads it there; by default the format's `load`.
    """

    packages: tuple[str, ...]
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class Triton:
    """How NVIDIA's Triton Inference Server serves an artifact.

    Attributes:
        backend: Triton's name of the runtime.
        file: The name that the runtime looks for in a version's folder.
        is_platform: Whether `backend` is given as the older field `platform` of a configuration.
        indexed: Whether the runtime needs the index of each tensor appended to its name: `x__0`.
    """

    backend: str
    file: str
    is_platform: bool = False
    indexed: bool = False


_TAKEN = ("source", "logs", MODULE, "eager", "pytorch")
"""Names that are reserved for folders of the export, the module as an upstream, and the baseline."""


Target = Literal["server CPU", "GPU", "phone", "browser", "microcontroller", "camera"]
"""What an artifact is deployed to; phones include boards with ARM processors, cameras include Coral devices."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Format:
    """A deployment format: everything the engine needs to know about it.

    Attributes:
        name: Its name in `formats=[...]`, in the report and on disk.
        description: One line for a human.
        url: The vendor's page.
        artifact: File name inside the format's folder; `"."` if the folder itself is the artifact.
        routes: The ways to make it, the preferred one first.
        load: Loads an artifact (call `open` instead); None if no machine can run it.
        runtime: The toolchain that `load` runs in; by default that of the route that made the artifact.
        precision: The precision that the artifact computes in.
        tolerance: By default the one that belongs to `precision`.
        aliases: Other names for it.
        uses_gpu: Whether its workers may use the GPU.
        lacks: Returns what this machine lacks for it besides packages, such as a device or a vendor's program, and
            where to get it, in a line; empty if nothing is missing.
        could_use: The same for what it is made and verified without, but would be verified further with.
        snippets: How applications load it; the most common language first.
        slow_because: Why its runtime may be slower than PyTorch on the same threads, or than in float32, if known.
        calibrated: Whether its routes calibrate with real batches (`ExportSpec.calibration`).
        triton: How Triton serves it; None if it does not.
        intermediates: Reads an artifact's intermediate tensors; None if its runtime cannot.
        targets: What it is deployed to, which every format has to say: `polyexport formats` groups by it, and the
            report names one artifact for each.
        page: File next to the artifact that runs it in a browser; empty if there is none.
        graph: File in the format's folder that Netron (https://netron.app) draws; empty if it reads none of them.
        on_device: How it is run on a machine that has only its runtime; None if it has no kit.

    Raises:
        BadRequest: its name cannot be a folder's in the export, or its precision is unknown.
    """

    name: str
    description: str
    url: str
    artifact: str
    routes: tuple[Route, ...]
    load: Load | None
    runtime: str | Toolchain | None = None
    precision: Precision = "float32"
    tolerance: Tolerance | None = None
    aliases: tuple[str, ...] = ()
    uses_gpu: bool = False
    lacks: Callable[[], str] = _nothing
    could_use: Callable[[], str] = _nothing
    snippets: tuple[Snippet, ...] = ()
    calibrated: bool = False
    slow_because: str = ""
    on_device: OnDevice | None = None
    intermediates: Intermediates | None = None
    targets: tuple[Target, ...] = ()
    triton: Triton | None = None
    page: str = ""
    graph: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in _TAKEN:
            raise BadRequest(
                f"a format cannot be called {self.name!r}: its name becomes a folder of the export; use letters, "
                f"digits, '_', '-' and '.', but not {', '.join(_TAKEN)}"
            )
        if self.precision not in PRECISIONS:
            raise BadRequest(
                f"{self.name} has the precision {self.precision!r}; known precisions: {', '.join(PRECISIONS)}"
            )

    @property
    def limits(self) -> Tolerance:
        """The tolerance that parity is judged by."""
        return self.tolerance or Tolerance.for_precision(self.precision)

    def open(self, path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
        """Load the artifact at `path`.

        Raises:
            CannotRun: nothing on this machine can run it.
        """
        return self._opened(self.load, path, spec, threads)

    def open_on_device(self, path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
        """Load the artifact at `path` on the machine that it is made for.

        Raises:
            CannotRun: this is not such a machine.
        """
        return self._opened((self.on_device and self.on_device.load) or self.load, path, spec, threads)

    def _opened(self, load: Load | None, path: Path, spec: ExportSpec, threads: int) -> Loaded:
        if load is None:
            raise CannotRun(f"no machine can run {self.name} directly")
        opened = load(path, spec, threads=threads)
        return opened if isinstance(opened, Loaded) else Loaded(opened)
