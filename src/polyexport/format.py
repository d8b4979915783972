"""The concepts of a format: what it is, the routes that lead to it, who opens it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from polyexport.errors import BadRequest, CannotRun
from polyexport.measure.tolerance import Tolerance
from polyexport.spec import PRECISIONS, Arrays, ExportSpec, Precision, Runner

if TYPE_CHECKING:
    from polyexport.workers.toolchain import Toolchain


@dataclass(frozen=True, slots=True)
class Observed:
    """What a runtime knows of itself once it was called.

    Attributes:
        verified_by: What ran the artifact, where that is not its own runtime, or one of several ways to run it.
        device: What it runs on, as `Latency.device`.
        first_ms: Time of the first call, where the caller could not see it; else None.
        peak_memory_bytes: Resident peak of the runtime's process, where that is not the caller's; else None.
    """

    verified_by: str | None = None
    device: str = "cpu"
    first_ms: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact in its runtime, and what the report is to say of it; it is called like `run`.

    Attributes:
        run: Runs it on PyTorch's named inputs; answers under PyTorch's names of the outputs.
        signature: The artifact's own; None where it is PyTorch's.
        shortfall: What it lacks of what was asked for, in a line; empty where nothing.
        remark: What a reader is to know of it beside that, such as which operators stay in float; empty where nothing.
        stand_in: Why this is not what will serve the artifact, and is not timed; empty where it is.
        observed: Tells what is known once `run` was called.
        labels: Names of the classes that travel with it.
        metadata: What else does: the user's, the checkpoint's hash, versions.
    """

    run: Runner
    signature: ExportSpec | None = None
    shortfall: str = ""
    remark: str = ""
    stand_in: str = ""
    observed: Callable[[], Observed] = Observed
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the artifact."""
        return self.run(inputs)


Convert = Callable[[Path, Path, ExportSpec], None]
"""`convert(source, target, spec)`: read the upstream artifact at `source`, write the artifact to `target`."""

MODULE = "module"
"""The upstream of a root route: the folder of a PyTorch module, read by `polyexport.capture.snapshot.load`."""


class Load(Protocol):
    """How a format opens an artifact."""

    def __call__(self, path: Path, spec: ExportSpec, *, threads: int) -> Runner | Loaded:
        """Open the artifact at `path` for CPU inference with `threads` threads.

        A plain function will do where the report has nothing to say beside it.

        Raises:
            CannotRun: nothing on this machine can run it.
        """


class Intermediates(Protocol):
    """How a format tells what an artifact computes on its way to the outputs."""

    def __call__(self, path: Path, spec: ExportSpec, inputs: Arrays, *, threads: int) -> Arrays:
        """Run the artifact at `path` on PyTorch's named inputs.

        Returns:
            Each float tensor that depends on the inputs, by the artifact's own names, in the order of computation;
            quantized ones as the numbers that they stand for, all in float32. Constants are left out.
        """


@dataclass(frozen=True, slots=True)
class Route:
    """One way to a format. Routes are tried in order, and parity is the judge.

    Attributes:
        name: What the report calls it.
        upstream: What `convert` reads: `"module"`, or the name of another format.
        toolchain: What `convert` runs in: the name of a requirement file in `toolchains/`, or a `Toolchain`.
        convert: Writes the artifact.
        static: Whether it takes fixed shapes only; it is then not tried with dynamic axes.
        trained: Whether its scales are those that the model was trained with, in place of calibration; it is then tried
            with such models only.
        mends: Whether it heeds `ExportSpec.in_float`, so that a budget that was missed can be kept after all.
    """

    name: str
    upstream: str
    toolchain: str | Toolchain
    convert: Convert
    static: bool = False
    trained: bool = False
    mends: bool = False


@dataclass(frozen=True, slots=True)
class Snippet:
    """How an application opens the artifact and calls it, shown by the report page.

    `code` is a jinja2 template of `path`, the artifact's, relative to the export's folder, where the code is run; of
    `inputs`, `TensorSpec`s whose dynamic axes are 1; of `names` and `outputs`, the names on either side; and of
    `output_dtypes` and `output_shapes`.
    """

    language: str
    code: str


@dataclass(frozen=True, slots=True)
class OnDevice:
    """How an artifact is run on the machine that it is made for, which has only its runtime (see `polyexport kit`).

    Attributes:
        packages: What `pip` installs there beside numpy; of the first, the runtime, the version stands in the report.
        load: Opens it there; by default the format's `load`.
    """

    packages: tuple[str, ...]
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class Triton:
    """How NVIDIA's Triton Inference Server serves an artifact.

    Attributes:
        backend: What it calls the runtime.
        file: The name that the runtime looks for in a version's folder.
        is_platform: Whether `backend` is one of the older words, which a configuration calls `platform`.
        indexed: Whether the runtime knows tensors by their index, which then stands behind the name: `x__0`.
    """

    backend: str
    file: str
    is_platform: bool = False
    indexed: bool = False


_TAKEN = ("source", "logs", MODULE, "eager", "pytorch")
"""What the export's own folders, the upstream of root routes and the baseline are called."""


Target = Literal["server CPU", "GPU", "phone", "browser", "microcontroller", "camera"]
"""What an artifact is shipped to; a phone stands for boards with its processor too, a camera for what Coral is in."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Format:
    """A deployment format: everything the engine has to know about it.

    Attributes:
        name: Its name in `formats=[...]`, in the report and on disk.
        description: One line for a human.
        url: The vendor's page.
        artifact: File name inside the format's folder; `"."` where the folder itself is the artifact.
        routes: The ways to it, the preferred one first.
        load: Opens an artifact (call `open`); None where no machine can run it.
        runtime: The toolchain that `load` runs in; by default that of the route that made the artifact.
        precision: What the artifact computes in.
        tolerance: By default the one that belongs to `precision`.
        aliases: Other names for it.
        uses_gpu: Whether its workers may see the GPU.
        lacks: Tells what this machine lacks for it beside packages, such as a device or a vendor's program, and where
            to get it, in a line; empty where nothing is missing.
        snippets: How applications open it, the language that it is mostly used from first.
        slow_because: Why its runtime may be slower than PyTorch on the same threads, as far as is known.
        calibrated: Whether its routes take number ranges from real batches (`ExportSpec.calibration`).
        triton: How Triton serves it; None where it does not.
        intermediates: Tells what an artifact computes on its way; None where its runtime does not.
        targets: What it is shipped to, which every format says: `polyexport formats` groups by it, and the report names
            one artifact for each.
        page: File beside the artifact that opens it in a browser; empty where there is none.
        on_device: How it is run on a machine that has only its runtime; None where it has no kit.

    Raises:
        BadRequest: its name cannot be that of a folder in the export, or its precision is none of `PRECISIONS`.
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
    snippets: tuple[Snippet, ...] = ()
    calibrated: bool = False
    slow_because: str = ""
    on_device: OnDevice | None = None
    intermediates: Intermediates | None = None
    targets: tuple[Target, ...] = ()
    triton: Triton | None = None
    page: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in _TAKEN:
            raise BadRequest(
                f"a format cannot be called {self.name!r}: it gives a folder of the export its name, so take letters, "
                f"digits, '_', '-' and '.', and not {', '.join(_TAKEN)}"
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
        """Open the artifact at `path` by `load`.

        Raises:
            CannotRun: nothing on this machine can run it.
        """
        return self._opened(self.load, path, spec, threads)

    def open_on_device(self, path: Path, spec: ExportSpec, *, threads: int) -> Loaded:
        """Open the artifact at `path` on the machine that it is made for.

        Raises:
            CannotRun: this is not one.
        """
        return self._opened((self.on_device and self.on_device.load) or self.load, path, spec, threads)

    def _opened(self, load: Load | None, path: Path, spec: ExportSpec, threads: int) -> Loaded:
        if load is None:
            raise CannotRun(f"no machine can run {self.name} directly")
        opened = load(path, spec, threads=threads)
        return opened if isinstance(opened, Loaded) else Loaded(opened)
