"""Weights & Biases: an artifact per format that agrees with PyTorch, tables over all checkpoints, registry links.

https://docs.wandb.ai/guides/artifacts, https://docs.wandb.ai/guides/registry

Requirements:
* W&B may be slow, refuse or be down: publishing takes at most `timeout` seconds, and what was not uploaded is reported.
  Uploads are waited for, since W&B reports a failure only to a caller that waits.
* What W&B stages for tables is in the run's folder, unless `WANDB_DATA_DIR` is set; its cache, which it prunes itself,
  keeps some kilobytes of tables.
* Only `verified` artifacts are linked to the registry.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from polyexport.errors import BadRequest, line
from polyexport.publish import wandb_artifacts as artifacts
from polyexport.publish.wandb_artifacts import PAGE
from polyexport.publish.wandb_figures import log_figures
from polyexport.publish.wandb_registry import LINKS, Link, link_of, store
from polyexport.report.compare import Bounds, compare
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, history


class Wandb:
    """A sink into a W&B run, online or offline.

    Not a dataclass, since Hydra takes those for a part of the configuration.

    Artifacts are named `model-<run id>-<format>`, of type `model`, one for each format that agrees with PyTorch, with
    the aliases `latest`, `best` and `parity-passed`, and `fastest` for the `verified` one with the lowest median
    latency. Their description, which W&B and its registry show as a card, is the table of all formats that agree. The
    page and its notes are another one, `report-<run id>`, of type `report`.

    Args:
        registry: Where verified artifacts are linked: `"<registry>/<collection>"`, or `"<registry>"` for collections
            with the project's name. Each format has its own collection, `<collection>-onnx`, in which `latest` and
            `best` are its newest version.
        upload: True for the files of the best export, `"all"` for those of every export of the run in turn (as
            `log_model` of Lightning's `WandbLogger` does), False for metrics only.
        aliases: Further aliases of the best checkpoint's artifacts.
        tags: Further tags, besides the format, the precision and the state.
        ttl_days: After how many days W&B may delete a version; None for the team's policy.
        old_ttl_days: The same for versions that are replaced by a newer one; None leaves them alone.
        timeout: Seconds that publishing may take.
        source: The artifact with the checkpoint. It is named in the metadata and becomes an input of this run, so that
            lineage leads from it to the exports. A name with a version (`"entity/project/name:v3"`) is used as it is;
            else it is the version with this checkpoint, once that is in W&B.
        alert: Whether to send an alert if a format's state is worse than at the previous best checkpoint, whose export
            has to be on disk.
        run: The run; None for that of the trainer's `WandbLogger`, or the active one.

    Raises:
        BadRequest: an option that W&B would refuse.
    """

    def __init__(
        self,
        registry: str | None = None,
        upload: bool | Literal["all"] = True,
        aliases: Sequence[str] = (),
        tags: Sequence[str] = (),
        ttl_days: float | None = None,
        old_ttl_days: float | None = None,
        timeout: float = 120.0,
        source: str | None = None,
        run: Any = None,
        alert: bool = False,
    ) -> None:
        self.registry = registry
        self.upload = upload
        self.aliases = list(aliases)
        self.tags = list(tags)
        self.ttl_days = ttl_days
        self.old_ttl_days = old_ttl_days
        self.timeout = timeout
        self.source = source
        self.run = run
        self.alert = alert
        self._check()

    def replaced(self, **options: Any) -> Wandb:
        """A copy with other options."""
        return Wandb(**(vars(self) | options))

    def _check(self) -> None:
        if self.upload not in (True, False, "all"):
            raise BadRequest(f"upload={self.upload!r}; known: True, False, 'all'")
        for alias in self.aliases:
            if not re.fullmatch(r"(?!v\d+$)[^/:]+", alias):
                raise BadRequest(f"alias {alias!r}: W&B allows no '/', no ':' and no version such as 'v2'")
        for tag in self.tags:
            if not re.fullmatch(r"[-\w]+( +[-\w]+)*", tag):
                raise BadRequest(f"tag {tag!r}: W&B allows letters, digits, '-', '_', and spaces between words")
        if self.registry is not None and not re.fullmatch(r"[-\w]+(/[-.\w]+)?", self.registry):
            raise BadRequest(f"registry={self.registry!r}; give '<registry>' or '<registry>/<collection>'")
        if min(self.timeout, self.ttl_days or 1, self.old_ttl_days or 1) <= 0:
            raise BadRequest("timeout, ttl_days and old_ttl_days must be greater than zero")

    def __call__(self, report: Report) -> None:
        """Publish a report.

        Raises:
            ConnectionError: something was not uploaded in time; everything else was.
        """
        import wandb as sdk

        run = self.run or sdk.run
        if run is None:
            raise BadRequest("there is no W&B run; give the trainer a WandbLogger, or use Wandb(run=…)")
        if run.disabled:
            return
        left: dict[str, str] = {}
        # some calls of W&B have no timeout; a daemon thread ends with the process
        arguments = (self, run, history(report), left)
        work = threading.Thread(target=_publish, args=arguments, name="polyexport-wandb", daemon=True)
        work.start()
        work.join(self.timeout)
        if left:
            raise ConnectionError("; ".join(f"{what}: {why}" for what, why in dict(left).items()))


def publish_into(report: Report, run: str, registry: str | None = None) -> None:
    """Publish a report to a finished run: after a proof from another machine, its artifacts are new versions.

    Args:
        report: An export of that run.
        run: `"project/run id"`, or `"entity/project/run id"`.
        registry: Where verified artifacts are linked, as in `Wandb`.

    Raises:
        BadRequest: `run` or `registry` has another form, or W&B has no such run.
        ConnectionError: something was not uploaded.
    """
    import wandb as sdk

    options = Wandb(registry=registry)
    *entity, project, name = ["", "", *run.split("/")][-3:] if run.count("/") in (1, 2) else ["", "", ""]
    if not (project and name):
        raise BadRequest(f"{run!r} is not a W&B run; write PROJECT/RUN or ENTITY/PROJECT/RUN, with the run's id")
    try:
        found = sdk.init(entity=entity[0] or None, project=project, id=name, resume="must")
    except sdk.errors.Error as error:
        raise BadRequest(f"W&B cannot open the run {run}: {line(error)}") from error
    with found:
        options.replaced(run=found)(report)


# --- all of it, in a thread of its own --------------------------------------------------------------------------------


Uploads = Mapping[str, tuple[Report, Outcome]]
"""The artifacts to upload, by their name in error messages: `<export>/<format>`."""


def _publish(options: Wandb, run: Any, reports: Sequence[Report], left: dict[str, str]) -> None:
    """Upload everything; `left` has at any moment what is not uploaded yet, and why."""
    deadline = time.monotonic() + options.timeout
    newest = reports[-1]
    exports = {True: reports[-1:], False: [], "all": reports}[options.upload]
    uploads = _uploads(exports)
    promised = ("figures", *uploads, *([PAGE] if exports else []))
    left |= dict.fromkeys(promised, f"not finished after {options.timeout:g} s")
    with _telling(left, "figures"), _staging(run):
        log_figures(run, reports)
    if options.alert:
        with _telling(left, "alert"):
            _alert(run, reports)
    if not exports:
        return
    if options.source and not run.offline:
        with _telling(left, options.source):
            options = options.replaced(source=artifacts.use_checkpoint(options.source, run, newest))
    sent = _log_artifacts(options, run, uploads, newest, left)
    page = None
    with _telling(left, PAGE, done=False):
        page = _log_page(options, run, newest)
    links: list[Link] = []
    for what, artifact in sent.items():
        report, outcome = uploads[what]
        with _telling(left, what):
            links += _arrived(options, run, outcome, artifact, deadline, newest=report is newest)
    if page is not None:
        with _telling(left, PAGE):
            if not run.offline:
                _wait(page, deadline)
    with _telling(left, LINKS):
        store(links, newest.folder)


def _alert(run: Any, reports: Sequence[Report]) -> None:
    """Send an alert if a format's state is worse than at the previous checkpoint."""
    worse = [
        f"{each.format}: {why}"
        for before, now in zip(reports[-2:-1], reports[-1:], strict=False)
        for each in compare(before, now, Bounds())
        for why in each.worse
    ]
    if worse:
        run.alert(f"{reports[-1].folder.name}: exports got worse", "\n".join(worse), level="WARN")


def _uploads(exports: Sequence[Report]) -> Uploads:
    return {
        f"{report.folder.name}/{outcome.format}": (report, outcome)
        for report in exports
        for outcome in report.publishable
    }


def _log_artifacts(options: Wandb, run: Any, uploads: Uploads, newest: Report, left: dict[str, str]) -> dict[str, Any]:
    """Start every upload; returns the artifacts that W&B accepted, by name."""
    sent = {}
    for what, (report, outcome) in uploads.items():
        with _telling(left, what, done=False):
            sent[what] = _log_artifact(options, run, report, outcome, newest=report is newest)
    return sent


def _log_artifact(options: Wandb, run: Any, report: Report, outcome: Outcome, *, newest: bool) -> Any:
    """Start the upload of a format's files."""
    artifact = artifacts.of_format(run, report, outcome, options.source)
    artifacts.expire(artifact, options.ttl_days if newest else options.old_ttl_days or options.ttl_days)
    aliases = ["latest", "best", "parity-passed"]
    if newest:
        aliases += [*options.aliases, *(["fastest"] if outcome is report.fastest else [])]
    tags = [*map(artifacts.word, (outcome.format, outcome.precision, outcome.shown_state)), *options.tags]
    return run.log_artifact(artifact, aliases=list(dict.fromkeys(aliases)), tags=list(dict.fromkeys(tags)))


def _log_page(options: Wandb, run: Any, report: Report) -> Any:
    """Start the upload of a report."""
    artifact = artifacts.of_report(run, report)
    artifacts.expire(artifact, options.ttl_days)
    return run.log_artifact(artifact, aliases=["latest", "best"])


def _arrived(
    options: Wandb, run: Any, outcome: Outcome, artifact: Any, deadline: float, *, newest: bool
) -> Iterator[Link]:
    """Wait for an artifact and link it; offline, yield the link to be stored."""
    target = link_of(options.registry, run, outcome, artifact) if newest else None
    if run.offline:
        yield from [target] if target else []
        return
    _wait(artifact, deadline)
    if newest and options.old_ttl_days is not None:
        artifacts.expire_predecessor(artifact, options.old_ttl_days)
    if target:
        run.link_artifact(artifact, target.target, aliases=list(target.aliases))


def _wait(artifact: Any, deadline: float) -> None:
    """Wait for an upload: only then is its version known, or its failure raised."""
    artifact.wait(timeout=max(1, int(deadline - time.monotonic())))


@contextmanager
def _telling(left: dict[str, str], what: str, *, done: bool = True) -> Iterator[None]:
    """Record in `left` why `what` failed, or remove it from there when it is `done`."""
    try:
        yield
    except Exception as error:  # W&B's client raises exceptions of many libraries
        left[what] = line(error)
    else:
        if done:
            left.pop(what, None)


@contextmanager
def _staging(run: Any) -> Iterator[None]:
    """Let W&B stage files in the run's folder; it reads the environment variable for each file."""
    ours = str(Path(run.dir).parent / "staging")
    os.environ.setdefault("WANDB_DATA_DIR", ours)
    try:
        yield
    finally:
        if os.environ["WANDB_DATA_DIR"] == ours:
            del os.environ["WANDB_DATA_DIR"]
