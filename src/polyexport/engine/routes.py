"""One export: every format asked for, by the first route whose artifact agrees with PyTorch.

Requirements:
* A format is built once per signature, however many others read it; formats that do not depend on each other run side
  by side.
* Asked-for properties beat the order of routes: all routes are tried with the dynamic axes before any is tried without.
* What fails stops only what depends on it, and every state has its reason.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyexport.engine import plan
from polyexport.engine.dispatch import Dispatcher
from polyexport.format import MODULE, Format, Route
from polyexport.measure.parity import Parity
from polyexport.measure.reference import Reference
from polyexport.report.folders import link
from polyexport.report.report import STATES, Artifact, Outcome, State, Toolchain
from polyexport.serialization import decode
from polyexport.spec import ExportSpec
from polyexport.workers import gpu, toolchain
from polyexport.workers.job import Job, Kind
from polyexport.workers.process import Ended

Watch = Callable[[str, str | Outcome | None], None]
"""Takes a format's name and what is being done with it; once it is done, its outcome, or None where it has none."""

_STATE_OF: Mapping[str, State] = {"missing": "skipped", "cannot run": "unverified"}


@dataclass(frozen=True, slots=True)
class Built:
    """A format's artifact as it lies in the export's folder, and what is known of it.

    `retry` tells whether static shapes may do what this did not: not where a tool is missing, nor where it hung.
    `warm` tells that it was converted by a worker that had done other jobs before.
    `shortfall` is what the verified artifact lacks of what was asked for.
    """

    outcome: Outcome
    path: str
    retry: bool = False
    warm: bool = False
    shortfall: str = ""

    @property
    def usable(self) -> bool:
        """Whether another format may be made from it."""
        return self.outcome.state in ("verified", "unverified")


class Build:
    """Builds the formats of one export, each once per signature."""

    def __init__(self, dispatcher: Dispatcher, formats: tuple[Format, ...], reference: Reference, watch: Watch) -> None:
        self._dispatcher = dispatcher
        self._asked = formats
        self._formats = plan.steps(formats)
        self._reference = reference
        self._watch = watch
        self._made: dict[tuple[str, bool], Future[Built]] = {}
        self._lock = threading.Lock()

    def outcomes(self) -> tuple[Outcome, ...]:
        """Build all that was asked for, side by side; in the order asked."""
        with ThreadPoolExecutor(len(self._asked), thread_name_prefix="polyexport-build") as pool:
            return tuple(pool.map(self._outcome, self._asked))

    def _outcome(self, each: Format) -> Outcome:
        try:
            built = self._best(each)
            if built.path and built.outcome.artifact:
                built = replace(built, outcome=self._settle(each, built))
            outcome = built.outcome
        except Exception as error:  # a bug of ours must not take the other formats along
            outcome = Outcome(each.name, each.precision, "failed", f"internal error: {type(error).__name__}: {error}")
        self._watch(each.name, outcome)
        return outcome

    def _best(self, each: Format) -> Built:
        """With the dynamic axes, and where no route can, without them."""
        built = self._built(each.name, dynamic=True)
        because = self._reference.static_because
        if self._reference.spec.is_dynamic and built.retry:
            static = self._built(each.name, dynamic=False)
            if static.outcome.state == "verified":
                built, because = static, built.outcome.reason
            elif static.outcome.state in ("failed", "mismatch") and _unlike(static.outcome, built.outcome):
                why = f"{built.outcome.reason}; with static shapes: {static.outcome.reason}"
                built = replace(built, outcome=replace(built.outcome, reason=why))
        lost = [f"static shapes only, since with dynamic axes: {because}"] if because else []
        lost += [built.shortfall] if built.shortfall else []
        if lost and built.outcome.state == "verified":
            built = replace(built, outcome=replace(built.outcome, state="degraded", reason="; ".join(lost)))
        return built

    def _built(self, name: str, *, dynamic: bool) -> Built:
        """The memoised build of one format; whoever asks first does it, the others wait."""
        dynamic = dynamic and self._reference.spec.is_dynamic
        with self._lock:
            future = self._made.get((name, dynamic))
            mine = future is None
            if future is None:
                future = self._made[name, dynamic] = Future()
        if mine:
            try:
                future.set_result(self._by_routes(self._formats[name], dynamic=dynamic))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _by_routes(self, each: Format, *, dynamic: bool) -> Built:
        """Try the routes in order until one verifies and lacks nothing; else the best, with what became of each."""
        tried: list[Built] = []
        for route in each.routes:
            built = self._by_route(each, route, dynamic=dynamic)
            if built.warm and built.retry:  # was it what the worker had done before?
                built = self._by_route(each, route, dynamic=dynamic, fresh=True)
            tried.append(built)
            if built.outcome.state == "verified" and not built.shortfall:
                break
        best = min(tried, key=lambda built: (STATES.index(built.outcome.state), bool(built.shortfall)))
        for built in tried:
            if built is not best:
                self._discard(built.path)
        retry = best.outcome.state in ("failed", "mismatch", "skipped") and any(built.retry for built in tried)
        return replace(best, outcome=replace(best.outcome, reason=_reason(best, tried)), retry=retry)

    def _by_route(self, each: Format, route: Route, *, dynamic: bool, fresh: bool = False) -> Built:
        """Upstream, conversion, verification: the first that fails decides."""
        spec = self._reference.spec if dynamic else self._reference.spec.static()
        outcome = Outcome(
            each.name, each.precision, "skipped", route=route.name, inputs=spec.inputs, outputs=spec.outputs
        )
        if each.needs_gpu and (why := gpu.missing()):
            return Built(replace(outcome, reason=why), "")
        source = "source"
        if route.upstream != MODULE:
            upstream = self._built(route.upstream, dynamic=dynamic)
            if not upstream.usable:
                reason = f"its upstream {route.upstream} is {upstream.outcome.state}: {upstream.outcome.reason}"
                return Built(replace(outcome, reason=reason), "", upstream.retry)
            source = upstream.path
        static = [] if spec.is_dynamic == self._reference.spec.is_dynamic else ["static"]
        label = ".".join([each.name, route.name, *static])
        made = self._converted(each, route, source, spec, label, outcome, fresh=fresh)
        return self._verified(each, route, spec, label, made) if made.path else made

    def _converted(
        self, each: Format, route: Route, source: str, spec: ExportSpec, label: str, outcome: Outcome, *, fresh: bool
    ) -> Built:
        """Write the artifact among the intermediates; without a path where that failed."""
        chain, log = toolchain.find(route.toolchain), f"logs/{each.name}.log"
        target = Path("source", "made", label, each.artifact).as_posix()
        self._watch(each.name, f"converting ({route.name})")
        self._discard(target)  # of a try before
        options = {"packages": chain.requirements}
        job = self._job(each, "convert", source, spec, route=route.name, target=target, options=options)
        ended, command = self._dispatcher.run(job, chain, f"{label}.convert", log, gpu=each.needs_gpu, fresh=fresh)
        outcome = replace(outcome, log=log, seconds={"convert": ended.seconds}, reproduce=command or None)
        if ended.ok:
            outcome = replace(outcome, toolchain=Toolchain(chain.name, ended.value["packages"]))
            return Built(outcome, target, warm=ended.warm)
        self._discard(target)  # half an artifact is none, and may have filled the disk
        state = _STATE_OF.get(ended.kind, "failed")
        retry = state == "failed" and ended.kind != "timed out"
        return Built(replace(outcome, state=state, reason=ended.error), "", retry, warm=ended.warm)

    def _verified(self, each: Format, route: Route, spec: ExportSpec, label: str, made: Built) -> Built:
        """Run what was converted in a process of its own, and say whether it agrees."""
        self._watch(each.name, f"verifying ({route.name})")
        runtime, log = toolchain.find(each.runtime or route.toolchain), made.outcome.log or ""
        batches = self._reference.batches if spec.is_dynamic else self._reference.batches[:1]
        job = self._job(each, "verify", made.path, spec, batches=batches, noise=self._reference.noise)
        ended, command = self._dispatcher.run(job, runtime, f"{label}.verify", log, gpu=each.needs_gpu)
        outcome = replace(made.outcome, seconds={**made.outcome.seconds, "verify": ended.seconds})
        outcome = judged(outcome, ended, command, made.path)
        if outcome.state == "mismatch" and self._reference.undecidable:
            why = f"nothing can be proven: {self._reference.undecidable}"
            outcome = replace(outcome, state="unverified", reason=why)
        retry = outcome.state in ("failed", "mismatch") and ended.kind != "timed out"
        shortfall = ended.value.get("shortfall", "") if ended.ok else ""
        return replace(made, outcome=outcome, retry=retry, shortfall=shortfall)

    def _job(self, each: Format, kind: Kind, source: str, spec: ExportSpec, **more: Any) -> Job:
        # a job elsewhere takes along what it names: what it calibrates with, or the batch that it traces with
        named = spec.calibration if each.calibrated else spec.calibration[:1]
        spec = replace(spec, calibration=named if kind == "convert" else ())
        return Job(kind, each.name, self._dispatcher.declared(each), source=source, spec=spec, **more)

    def _settle(self, each: Format, built: Built) -> Outcome:
        """Give what was asked for its place; among the intermediates it stays too."""
        artifact = built.outcome.artifact
        assert artifact is not None, "only what was made is settled"
        made, place = self._dispatcher.root / "source" / "made", self._dispatcher.root / each.name
        folder = made / Path(built.path).relative_to("source/made").parts[0]
        with self._lock:  # by hard links, since another format may still read it where it lies
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place, copy_function=link)
        where = Path(each.name, each.artifact).as_posix()
        return replace(built.outcome, artifact=replace(artifact, path=where))

    def _discard(self, path: str) -> None:
        if path:
            folder = self._dispatcher.root.joinpath(*Path(path).parts[:3])
            shutil.rmtree(folder, ignore_errors=True)


def judged(outcome: Outcome, ended: Ended, command: str, target: str) -> Outcome:
    """An outcome with what its verification, of the artifact at `target`, found out."""
    if not ended.ok:
        # the artifact is there; where the tool to run it is missing, that is all that can be said of it
        state: State = "unverified" if ended.kind in ("missing", "cannot run") else "failed"
        word = "" if state == "unverified" else "the artifact does not run: "
        outcome = replace(outcome, state=state, reason=word + ended.error, reproduce=command or outcome.reproduce)
        return replace(outcome, artifact=Artifact(target, 0, ""))
    parity = decode(Parity, ended.value["parity"])
    artifact = Artifact(target, ended.value["bytes"], ended.value["sha256"])
    outcome = replace(outcome, artifact=artifact, parity=parity)
    if "signature" in ended.value:
        own = decode(ExportSpec, ended.value["signature"])
        outcome = replace(outcome, inputs=own.inputs, outputs=own.outputs)
    if parity.passed:
        return replace(outcome, state="verified")
    return replace(outcome, state="mismatch", reason=parity.reason, reproduce=command)


def _unlike(one: Outcome, other: Outcome) -> bool:
    """Whether the reasons of two outcomes differ in more than figures."""
    return re.sub(r"\d", "", one.reason) != re.sub(r"\d", "", other.reason)


def _reason(best: Built, tried: Sequence[Built]) -> str:
    """Why the format is in its state: what became of the routes that were run."""
    verified = best.outcome.state == "verified"
    told = [
        f"{b.outcome.route}: {b.outcome.state}: {b.outcome.reason or b.shortfall}"
        for b in (tried[: tried.index(best)] if verified else tried)
        if b.outcome.state != "skipped"
    ]
    if verified:
        return f"by another route, since {'; '.join(told)}" if told else ""
    different = len({built.outcome.reason for built in tried}) > 1
    return "; ".join(told) if len(told) > 1 and different else best.outcome.reason
