"""One export: every format asked for, by the first route whose artifact agrees with PyTorch.

Requirements:
* A format is built once per signature, however many others read it; formats that do not depend on each other run side
  by side.
* Asked-for properties beat the order of routes: all routes are tried with the dynamic axes before any is tried without.
* What fails stops only what depends on it, and every state has its reason.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyexport import gpu, plan, toolchain
from polyexport.format import MODULE, Format, Route
from polyexport.formats import known
from polyexport.job import Job, Kind, reproduce
from polyexport.parity import Parity
from polyexport.process import Ended, Workers, environment
from polyexport.records import decode, write_json
from polyexport.reference import Reference
from polyexport.report import STATES, Artifact, Outcome, State, Toolchain
from polyexport.spec import ExportSpec

Watch = Callable[[str, str], None]
"""Takes a format's name and what is being done with it; an empty string once it is done."""

_STATE_OF: Mapping[str, State] = {"missing": "skipped", "cannot run": "unverified"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a worker may take."""

    timeout: float
    threads: int
    nice: int = 10


@dataclass(frozen=True, slots=True)
class Built:
    """A format's artifact as it lies in the export's folder, and what is known of it."""

    outcome: Outcome
    path: str
    spec: ExportSpec
    timed_out: bool = False

    @property
    def usable(self) -> bool:
        """Whether another format may be made from it."""
        return self.outcome.state in ("verified", "unverified")


class Runner:
    """Starts jobs for one export folder. `final` is where the folder will lie once it is complete."""

    def __init__(
        self, root: Path, final: Path, *, workers: Workers, slots: Executor, bounds: Bounds, sys_path: tuple[str, ...]
    ) -> None:
        self.root = root
        self.final = final
        self.bounds = bounds
        self._workers = workers
        self._slots = slots
        self._sys_path = sys_path

    def run(self, job: Job, chain: toolchain.Toolchain, name: str, log: str, *, gpu: bool = False) -> tuple[Ended, str]:
        """Run a job in a toolchain when a slot is free; returns how it ended and the command to run it again."""
        try:
            command = chain.command()
        except Exception as error:  # an environment that cannot be made is a missing tool, whatever went wrong in it
            return Ended(error=str(error), kind="missing"), ""
        path = self.place(job, chain, name)
        done = self._slots.submit(
            self._workers.run,
            command,
            path,
            self.root / log,
            timeout=self.bounds.timeout,
            environment=environment(threads=self.bounds.threads, gpu=gpu, host=chain.in_host),
        )
        return done.result(), reproduce(command, self.final / path.relative_to(self.root))

    def place(self, job: Job, chain: toolchain.Toolchain, name: str) -> Path:
        """Write a job's file."""
        path = self.root / "source" / "jobs" / f"{name}.json"
        own = self._sys_path if chain.in_host or chain.layered else ()
        write_json(path, replace(job, threads=self.bounds.threads, nice=self.bounds.nice, sys_path=own))
        return path


class Build:
    """Builds the formats of one export, each once per signature."""

    def __init__(self, runner: Runner, formats: tuple[Format, ...], reference: Reference, watch: Watch) -> None:
        self._runner = runner
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
        self._watch(each.name, "")
        return outcome

    def _best(self, each: Format) -> Built:
        """With the dynamic axes, and where no route can, without them."""
        built = self._built(each.name, dynamic=True)
        because = self._reference.static_because
        if self._reference.spec.is_dynamic and not built.timed_out and built.outcome.state in ("failed", "mismatch"):
            static = self._built(each.name, dynamic=False)
            if static.outcome.state == "verified":
                built, because = static, built.outcome.reason
        if because and built.outcome.state == "verified":
            reason = f"static shapes only, since with dynamic axes: {because}"
            built = replace(built, outcome=replace(built.outcome, state="degraded", reason=reason))
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
        """Try the routes in order until one verifies; else the best of them, with what became of each."""
        tried: list[Built] = []
        for route in each.routes:
            tried.append(self._by_route(each, route, dynamic=dynamic))
            if tried[-1].outcome.state == "verified":
                break
        best = min(tried, key=lambda built: STATES.index(built.outcome.state))
        others = [built for built in tried if built is not best and built.outcome.state != "skipped"]
        if best.outcome.state == "verified":
            reasons = [f"{built.outcome.route}: {_worded(built)}" for built in others]
            if reasons:
                reasons.insert(0, "by another route, since")
        elif others:
            reasons = [f"{built.outcome.route}: {_worded(built)}" for built in (best, *others)]
        else:
            reasons = [best.outcome.reason]
        for built in others:
            self._discard(built)
        timed_out = all(built.timed_out or built.outcome.state == "skipped" for built in tried)
        head, *rest = reasons or [""]
        joined = f"{head} {'; '.join(rest)}" if head.endswith("since") else "; ".join(reasons)
        return replace(best, outcome=replace(best.outcome, reason=joined), timed_out=timed_out)

    def _by_route(self, each: Format, route: Route, *, dynamic: bool) -> Built:
        """Upstream, conversion, verification: the first that fails decides."""
        spec = self._reference.spec if dynamic else self._reference.spec.static()
        outcome = Outcome(
            each.name, each.precision, "skipped", route=route.name, inputs=spec.inputs, outputs=spec.outputs
        )
        if each.needs_gpu and (why := gpu.missing()):
            return Built(replace(outcome, reason=why), "", spec)
        source = "source"
        if route.upstream != MODULE:
            upstream = self._built(route.upstream, dynamic=dynamic)
            if not upstream.usable:
                reason = f"its upstream {route.upstream} is {upstream.outcome.state}: {upstream.outcome.reason}"
                return Built(replace(outcome, reason=reason), "", spec)
            source = upstream.path
        label = ".".join(
            [each.name, route.name, *([] if dynamic or not self._reference.spec.is_dynamic else ["static"])]
        )
        log = f"logs/{each.name}.log"
        target = f"source/made/{label}/{each.artifact}"
        outcome = replace(outcome, log=log)
        chain = toolchain.find(route.toolchain)
        self._watch(each.name, f"converting ({route.name})")
        job = self._job(
            each, "convert", source, spec, route=route.name, target=target, options={"packages": chain.requirements}
        )
        ended, command = self._runner.run(job, chain, f"{label}.convert", log, gpu=each.needs_gpu)
        seconds = {"convert": ended.seconds}
        outcome = replace(outcome, seconds=seconds, reproduce=command or None)
        if not ended.ok:
            state = _STATE_OF.get(ended.kind, "failed")
            return Built(replace(outcome, state=state, reason=ended.error), "", spec, ended.kind == "timed out")
        outcome = replace(outcome, toolchain=Toolchain(chain.name, ended.value["packages"]))
        self._watch(each.name, f"verifying ({route.name})")
        runtime = toolchain.find(each.runtime or route.toolchain)
        batches = self._reference.batches if dynamic else self._reference.batches[:1]
        job = self._job(each, "verify", target, spec, batches=batches, noise=self._reference.noise)
        ended, command = self._runner.run(job, runtime, f"{label}.verify", log, gpu=each.needs_gpu)
        outcome = replace(outcome, seconds=seconds | {"verify": ended.seconds})
        return self._judged(each, outcome, ended, command, target, spec)

    def _judged(
        self, each: Format, outcome: Outcome, ended: Ended, command: str, target: str, spec: ExportSpec
    ) -> Built:
        if not ended.ok:
            # the artifact is there; where the tool to run it is missing, that is all that can be said of it
            state: State = "unverified" if ended.kind in ("missing", "cannot run") else "failed"
            word = "" if state == "unverified" else "the artifact does not run: "
            outcome = replace(outcome, state=state, reason=word + ended.error, reproduce=command or outcome.reproduce)
            outcome = replace(outcome, artifact=Artifact(target, 0, ""))
            return Built(outcome, target, spec, ended.kind == "timed out")
        parity = decode(Parity, ended.value["parity"])
        outcome = replace(
            outcome, artifact=Artifact(target, ended.value["bytes"], ended.value["sha256"]), parity=parity
        )
        if parity.passed:
            return Built(replace(outcome, state="verified"), target, spec)
        return Built(replace(outcome, state="mismatch", reason=parity.reason, reproduce=command), target, spec)

    def _job(self, each: Format, kind: Kind, source: str, spec: ExportSpec, **more: Any) -> Job:
        declared = None if known().get(each.name) is each else declare(self._runner.root, each)
        return Job(kind, each.name, declared, source=source, spec=spec, **more)

    def _settle(self, each: Format, built: Built) -> Outcome:
        """Move what was asked for from among the intermediates to its place."""
        artifact = built.outcome.artifact
        assert artifact is not None, "only what was made is settled"
        made, place = self._runner.root / "source" / "made", self._runner.root / each.name
        folder = made / Path(built.path).relative_to("source/made").parts[0]
        with self._lock:  # another format may still read it where it lies: the folder moves, a link stays
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place, copy_function=_link)
        where = Path(each.name, each.artifact).as_posix()
        return replace(built.outcome, artifact=replace(artifact, path=where))

    def _discard(self, built: Built) -> None:
        if built.path:
            folder = self._runner.root.joinpath(*Path(built.path).parts[:3])
            shutil.rmtree(folder, ignore_errors=True)


def declare(root: Path, each: Format) -> str:
    """Pickle a `Format` that is not one of ours, its functions by value, so that a worker needs no import of it."""
    import sys

    import cloudpickle

    path = root / "source" / "formats" / f"{each.name}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = [route.convert for route in each.routes] + ([each.load] if each.load else [])
    with contextlib.ExitStack() as stack:
        for name in {function.__module__ for function in functions if not function.__module__.startswith("polyexport")}:
            home = sys.modules.get(name)
            if home is not None and name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(home)
                stack.callback(cloudpickle.unregister_pickle_by_value, home)
        path.write_bytes(cloudpickle.dumps(each))
    return path.relative_to(root).as_posix()


def _worded(built: Built) -> str:
    return f"{built.outcome.state}: {built.outcome.reason}"


def _link(source: str, target: str) -> None:
    import os

    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
