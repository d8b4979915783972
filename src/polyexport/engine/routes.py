"""One export: each format is made by the first route whose artifact agrees with PyTorch.

Requirements:
* A format is built once per signature, however many others read it; formats that do not depend on each other run side
  by side.
* What was asked for comes before the order of routes: all routes are tried with the dynamic axes before any is tried
  without, and with all processing steps before any is tried with a step outside of the artifact.
* A failure stops only what depends on it, and every state has its reason.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from polyexport.engine import plan
from polyexport.engine.dispatch import Dispatcher
from polyexport.errors import line
from polyexport.format import MODULE, Format, Route
from polyexport.measure.dynamic_axes import BATCH
from polyexport.measure.parity import Parity
from polyexport.measure.reference import Reference
from polyexport.measure.verification import fingerprint
from polyexport.report.folders import DESCRIPTION, link
from polyexport.report.outcome import STATES, Artifact, Calibration, Outcome, State, Toolchain, lacking
from polyexport.serialization import decode
from polyexport.spec import LOW, ExportSpec
from polyexport.tracing.reads import named
from polyexport.workers import toolchain
from polyexport.workers.job import Convert, Verify, module_of, proofs
from polyexport.workers.process import JobResult

Watch = Callable[[str, str | Outcome | None], None]
"""Called with a format's name and what is being done with it; when it is done, with its outcome, or None."""

Part = Callable[[], Reference | None]
"""Makes the reference of the module without some processing steps; None if that failed."""

T = TypeVar("T")

_STATIC = ".static"
"""Part of the name of what is made with static shapes."""

_STATE_OF: Mapping[str, State] = {"missing": "skipped", "nothing to do": "skipped", "cannot run": "unverified"}


@dataclass(frozen=True, slots=True)
class Built:
    """A format's artifact in the export's folder, and what is known of it.

    Attributes:
        outcome: Its outcome so far.
        path: The artifact's path, relative to the export's folder; empty where there is none.
        retry: Whether static shapes are worth a try: not where a tool is missing, or the job timed out.
        shortfall: What the verified artifact lacks of what was asked for, in a line.
        narrow: Why the artifact is right for some data only, which holds for all formats made from it too.
        frozen: The lines of forward whose values the trace fixed as constants.
        detour: Why preferred routes were not taken.
    """

    outcome: Outcome
    path: str
    retry: bool = False
    shortfall: str = ""
    narrow: str = ""
    frozen: tuple[str, ...] = ()
    detour: str = ""

    @property
    def usable(self) -> bool:
        """Whether another format may be made from it."""
        return self.outcome.state in ("verified", "unverified")


class Build:
    """Builds the formats of one export, each once per signature."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        formats: tuple[Format, ...],
        reference: Reference,
        watch: Watch,
        parts: Mapping[tuple[str, ...], Part] = MappingProxyType({}),
        outside: tuple[str, ...] = (),
    ) -> None:
        self._dispatcher = dispatcher
        self._asked = formats
        self._formats = plan.steps(formats)
        self._reference = reference
        self._watch = watch
        self._parts = parts
        self._outside = outside
        self._made: dict[Hashable, Future[Any]] = {}
        self._detours: dict[str, str] = {}
        self._lock = threading.Lock()
        self.references: dict[str, Reference] = {}
        """The reference of each format whose artifact lacks processing steps."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on preferred routes that failed, in the order of the formats."""
        return tuple(self._detours[each.name] for each in self._asked if each.name in self._detours)

    def outcomes(self) -> tuple[Outcome, ...]:
        """Build all formats in parallel; their outcomes in the order asked."""
        with ThreadPoolExecutor(len(self._asked), thread_name_prefix="polyexport-build") as pool:
            return tuple(pool.map(self._outcome, self._asked))

    def _outcome(self, each: Format) -> Outcome:
        try:
            built = self._best(each)
            if built.path and built.outcome.artifact:
                built = replace(built, outcome=self._settle(each, built))
            outcome = built.outcome
            if built.detour and outcome.publishable:
                self._detours[each.name] = f"{each.name}: made by the route {outcome.route}, since {built.detour}"
        except OSError as error:
            outcome = Outcome(each.name, each.precision, "failed", line(error))
        except Exception as error:  # a bug of ours must not take the other formats along
            outcome = Outcome(
                each.name, each.precision, "failed", f"internal error of this library, please report it: {line(error)}"
            )
        self._watch(each.name, outcome)
        return outcome

    def _best(self, each: Format) -> Built:
        """The format with all processing steps, or without one that it is not made with, or for some data only."""
        built = self._whole(each)
        pardoned = built.outcome.state == "mismatch" and each.precision in LOW  # by a budget, if there is one
        if pardoned or not (built.retry or built.narrow):
            return built
        for outside, make in self._parts.items():
            part = self._once(outside, partial(self._part, outside, make))
            found = part._whole(each) if part else built
            if part and _is_better(found, built) and not (built.narrow and found.narrow):
                if not built.usable:  # else another format may be made from it right now
                    self._discard(built.path)
                self.references[each.name] = part._reference
                return replace(found, outcome=_without(found.outcome, outside, built.outcome.reason))
        return built

    def _part(self, outside: tuple[str, ...], make: Part) -> Build | None:
        if (reference := make()) is None:
            return None
        return Build(self._dispatcher, self._asked, reference, self._watch, outside=outside)

    def _whole(self, each: Format) -> Built:
        """The format with dynamic axes, or without them if no route can make it with them."""
        built = self._built(each.name, dynamic=True)
        because = self._reference.static_because
        if self._reference.spec.is_dynamic and built.retry:
            static = self._built(each.name, dynamic=False)
            proves_nothing = static.outcome.state == "unverified" and bool(self._reference.undecidable)
            if static.outcome.state == "verified" or proves_nothing:
                built, because = static, built.outcome.reason
            elif static.outcome.state in ("failed", "mismatch"):
                why = also_static(built.outcome.reason, static.outcome.reason)
                built = replace(built, outcome=replace(built.outcome, reason=why))
        fixed = _fixed(self._reference.spec)
        lost = [f"static shapes only{fixed}; with dynamic axes: {because}"] if because else []
        lost += [each for each in (built.shortfall, self._reference.unlabeled) if each]
        if lost and built.outcome.state == "verified":
            built = replace(built, outcome=replace(built.outcome, state="degraded", reason="; ".join(lost)))
        return built

    def _built(self, name: str, *, dynamic: bool) -> Built:
        """The memoized build of one format."""
        dynamic = dynamic and self._reference.spec.is_dynamic
        return self._once((name, dynamic), lambda: self._by_routes(self._formats[name], dynamic=dynamic))

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The memoized result of `make`; the first caller runs it, others wait."""
        with self._lock:
            future: Future[T] | None = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _by_routes(self, each: Format, *, dynamic: bool) -> Built:
        """Try the routes in order until one verifies without a shortfall; else the best, with a reason for each."""
        tried: list[Built] = []
        routes = [route for route in each.routes if self._reference.spec.has_trained_scales or not route.trained]
        static = [route for route in routes if route.static]
        if dynamic:  # which trained scales count more than
            routes = [] if any(route.trained for route in static) else [route for route in routes if not route.static]
        for route in routes:
            built = self._by_route(each, route, dynamic=dynamic)
            tried.append(built)
            if built.outcome.state == "verified" and not built.shortfall:
                break
        if not tried:
            why = f"{', '.join(route.name for route in static)}: for static shapes only"
            return Built(Outcome(each.name, each.precision, "failed", why), "", retry=True)
        best = min(tried, key=lambda built: (STATES.index(built.outcome.state), bool(built.shortfall)))
        for built in tried:
            if built is not best:
                self._discard(built.path)
        retry = best.outcome.state in ("failed", "mismatch", "skipped") and any(built.retry for built in tried)
        outcome = replace(best.outcome, reason=_reason(best, tried))
        if outcome.state == "failed":
            outcome = replace(outcome, reason=with_advice(outcome.reason, self._reference))
        return replace(best, outcome=outcome, retry=retry, detour=_detour(best, tried), shortfall=_lost(best, tried))

    def _by_route(self, each: Format, route: Route, *, dynamic: bool) -> Built:
        """Upstream, conversion, verification; stops at the first that fails."""
        spec = self._reference.spec if dynamic else self._reference.spec.static()
        outcome = Outcome(
            each.name, each.precision, "skipped", route=route.name, inputs=spec.inputs, outputs=spec.outputs
        )
        if each.uses_gpu and (why := each.lacks()):
            return Built(replace(outcome, reason=why), "")
        source, upstream = module_of(self._reference.batches[0].path), Built(outcome, "")
        if route.upstream != MODULE:
            upstream = self._built(route.upstream, dynamic=dynamic)
            if not upstream.usable:
                reason = f"made from {route.upstream}, which is {upstream.outcome.state}: {upstream.outcome.reason}"
                return Built(replace(outcome, reason=reason), "", upstream.retry)
            source = upstream.path
        name = label(each, route, static=spec.is_dynamic != self._reference.spec.is_dynamic, outside=self._outside)
        made = self._converted(each, route, source, spec, name, outcome)
        made = replace(made, narrow=upstream.narrow, frozen=(*upstream.frozen, *made.frozen))
        return self._verified(each, route, spec, name, made) if made.path else made

    def _converted(
        self, each: Format, route: Route, source: str, spec: ExportSpec, name: str, outcome: Outcome
    ) -> Built:
        """Convert into the folder of intermediates; the path is empty if that failed."""
        chain, log = toolchain.find(route.toolchain), f"logs/{each.name}.log"
        target = Path("source", "made", name, each.artifact).as_posix()
        self._watch(each.name, f"converting ({route.name})")
        self._discard(target)  # from an earlier try
        # a job on another machine takes along the files that it names: the batches to calibrate or to trace with
        named = spec.calibration if each.calibrated else spec.calibration[:1]
        job = Convert(
            format=each.name,
            declared=self._dispatcher.declared(each),
            source=source,
            spec=replace(spec, calibration=named),
            route=route.name,
            target=target,
            packages=chain.requirements,
        )
        ended = self._dispatcher.run(job, chain, f"{name}.convert", log, gpu=each.uses_gpu)
        outcome = replace(outcome, log=log, seconds={"convert": ended.seconds}, reproduce=ended.command or None)
        if ended.ok:
            calibrated = ended.value["calibration"]
            outcome = replace(
                outcome,
                toolchain=Toolchain(chain.name, ended.value["packages"]),
                calibration=None if calibrated is None else decode(Calibration, calibrated),
            )
            return Built(outcome, target, frozen=tuple(ended.value["frozen"]))
        self._discard(target)  # a partial artifact is useless, and may have filled the disk
        state = _STATE_OF.get(ended.kind, "failed")
        retry = state == "failed" and ended.kind != "timed out"
        return Built(replace(outcome, state=state, reason=ended.error), "", retry)

    def _verified(self, each: Format, route: Route, spec: ExportSpec, name: str, made: Built) -> Built:
        """Run the artifact in a process of its own, and compare it with PyTorch."""
        self._watch(each.name, f"verifying ({route.name})")
        runtime, log = toolchain.find(each.runtime or route.toolchain), made.outcome.log or ""
        # in a low precision, other values may be outside the calibrated ranges
        batches = proofs(self._reference.batches, dynamic=spec.is_dynamic, made_up=each.precision == "float32")
        job = Verify(
            format=each.name,
            declared=self._dispatcher.declared(each),
            source=made.path,
            spec=replace(spec, calibration=()),
            batches=batches,
            noise=self._reference.noise,
        )
        ended = self._dispatcher.run(job, runtime, f"{name}.verify", log, gpu=each.uses_gpu)
        outcome = replace(made.outcome, seconds={**made.outcome.seconds, "verify": ended.seconds})
        outcome = counted(self._dispatcher.root, judged(outcome, ended, made.path))
        if outcome.state in ("verified", "mismatch") and self._reference.undecidable:
            why = f"nothing can be proven: {self._reference.undecidable}"
            outcome = replace(outcome, state="unverified", reason=why)
        retry = outcome.state in ("failed", "mismatch") and ended.kind != "timed out"
        found = ended.value if ended.ok else {}
        why = made.narrow or narrow(found.get("elsewhere", ""), made.frozen, self._reference)
        lost = [each for each in (why, found.get("shortfall", "")) if each]
        return replace(made, outcome=outcome, retry=retry, shortfall="; ".join(lost), narrow=why)

    def _settle(self, each: Format, built: Built) -> Outcome:
        """Hard-link the artifact from the intermediates to its final folder."""
        artifact = built.outcome.artifact
        assert artifact is not None, "only what was made is settled"
        with self._lock:
            where = placed(self._dispatcher.root, each, built.path)
        return replace(built.outcome, artifact=replace(artifact, path=where))

    def _discard(self, path: str) -> None:
        if path:
            folder = self._dispatcher.root.joinpath(*Path(path).parts[:3])
            shutil.rmtree(folder, ignore_errors=True)


def label(each: Format, route: Route, *, static: bool, outside: Sequence[str]) -> str:
    """The name of what a route makes, among jobs and intermediates."""
    return ".".join([each.name, route.name + (_STATIC if static else ""), *(f"without-{step}" for step in outside)])


def placed(root: Path, each: Format, path: str) -> str:
    """Hard-link the artifact at `path` to its final folder; both paths are relative to the export at `root`."""
    place = root / each.name
    shutil.rmtree(place, ignore_errors=True)
    # by hard links, since another format may still read it where it lies
    shutil.copytree(root.joinpath(*Path(path).parts[:3]), place, copy_function=link)
    return Path(each.name, each.artifact).as_posix()


def judged(outcome: Outcome, ended: JobResult, target: str) -> Outcome:
    """The outcome after its verification of the artifact at `target`."""
    if not ended.ok:
        # the artifact exists, and without the tool to run it no more is known
        state: State = "unverified" if ended.kind in ("missing", "cannot run") else "failed"
        word = "" if state == "unverified" else "the artifact does not run: "
        outcome = replace(outcome, state=state, reason=word + ended.error, reproduce=ended.command or outcome.reproduce)
        return replace(outcome, artifact=Artifact(target, 0, ""))
    parity = decode(Parity, ended.value["parity"])
    artifact = Artifact(target, ended.value["bytes"], ended.value["sha256"])
    outcome = replace(outcome, artifact=artifact, parity=parity, remark=ended.value["remark"])
    if ended.value["signature"] is not None:
        own = decode(ExportSpec, ended.value["signature"])
        outcome = replace(outcome, inputs=own.inputs, outputs=own.outputs)
    if parity.passed:
        return replace(outcome, state="verified")
    return replace(outcome, state="mismatch", reason=parity.reason, reproduce=ended.command)


def counted(root: Path, outcome: Outcome) -> Outcome:
    """The outcome with size and hash of an artifact that no worker could open; `root` is the export's folder."""
    if outcome.artifact is None or outcome.artifact.sha256:
        return outcome
    made = root / outcome.artifact.path
    size, sha256 = fingerprint(made if made.is_dir() else made.parent, DESCRIPTION)
    return replace(outcome, artifact=replace(outcome.artifact, bytes=size, sha256=sha256))


def narrow(elsewhere: str, frozen: Sequence[str] = (), reference: Reference | None = None) -> str:
    """Why an artifact is right for some data only; `elsewhere` says on which data it was found wrong, if on any."""
    kept = set(frozen) & set(reference.read_at if reference else ())
    if elsewhere:
        since = f"; forward branches on its data at {named(kept)}, and a trace keeps one branch" if kept else ""
        if not kept and reference and reference.empty_at:
            since = (
                f"; forward selects elements by their values ({named(set(reference.empty_at))}), of which there may be "
                "none; computing all of them and multiplying by the mask, or torch.where, needs no empty tensors"
            )
        return f"right on data like the first batch only: {elsewhere}{since}"
    if one := kept & set(reference.one_side if reference else ()):
        return f"one branch only: forward branches on its data, and every batch took the same branch ({named(one)})"
    return reference.narrow if reference else ""


def with_advice(reason: str, reference: Reference) -> str:
    """Why a converter failed, in its own words, with what forward does that converters do not have."""
    if (read := named(set(reference.read_at))) and read not in reason:
        reason += f"; forward branches on its data at {read}: torch.where, or computing all, needs no branch"
    if reference.undecidable:
        reason += f"; nor could it be proven: {reference.undecidable}"
    return reason


def also_static(reason: str, static: str) -> str:
    """A reason with that of static shapes behind it, unless they differ in the artifact's folder alone."""
    return reason if static.replace(_STATIC, "") == reason else f"{reason}; with static shapes: {static}"


def _fixed(spec: ExportSpec) -> str:
    """Which axes besides the batch became static, and the `dynamic` argument that keeps at least the batch dynamic."""
    fixed = [
        f"axis {axis} of {tensor.name} is {spec.sizes[called]}"
        for tensor in spec.inputs
        for axis, called in tensor.dynamic.items()
        if called != BATCH
    ]
    batch = {t.name: {axis: BATCH for axis, called in t.dynamic.items() if called == BATCH} for t in spec.inputs}
    freed = {name: axes for name, axes in batch.items() if axes}
    return f" ({', '.join(fixed)}; dynamic={freed} keeps the batch axis dynamic)" if fixed else ""


def _is_better(found: Built, whole: Built) -> bool:
    """Whether an artifact without a step is better than what came of all of them.

    It agrees, or nothing here can run it (an engine for another GPU), and with the step it could not be made at all.
    """
    made = found.outcome.state == "unverified" and whole.outcome.state in ("failed", "skipped")
    return found.outcome.publishable or made


def _without(outcome: Outcome, outside: tuple[str, ...], why: str) -> Outcome:
    """The outcome of an artifact without processing steps; `why` is what happened with them."""
    lost = f"{lacking(outside)}; with {' and '.join(outside)}: {why}"
    reason = "; ".join(filter(None, [lost, outcome.reason]))
    return replace(outcome, state="degraded" if outcome.publishable else outcome.state, reason=reason, outside=outside)


def _reason(best: Built, tried: Sequence[Built]) -> str:
    """Why the format is in its state, route by route; empty if it is verified."""
    if best.outcome.state == "verified":
        return ""
    ran = [built for built in tried if built.outcome.state != "skipped"]
    different = len({built.outcome.reason for built in ran}) > 1
    return _reasons(ran) if len(ran) > 1 and different else best.outcome.reason


def _detour(best: Built, tried: Sequence[Built]) -> str:
    """Why the routes before the one that verified were not taken."""
    return _reasons(tried[: tried.index(best)]) if best.outcome.state == "verified" else ""


def _lost(best: Built, tried: Sequence[Built]) -> str:
    """What the best one lacks, and why the routes after it, which were tried for that, are no better."""
    if best.outcome.state != "verified" or not best.shortfall:
        return best.shortfall
    later = [built for built in tried[tried.index(best) + 1 :] if built.shortfall != best.shortfall]
    return "; ".join(filter(None, [best.shortfall, _reasons(later)]))


def _reasons(tried: Sequence[Built]) -> str:
    """The reason of each route; for one that verified and was not taken, its shortfall."""
    return "; ".join(
        f"{built.outcome.route}: "
        + (built.shortfall if built.outcome.state == "verified" else f"{built.outcome.state}: {built.outcome.reason}")
        for built in tried
        if built.outcome.state != "skipped"
    )
