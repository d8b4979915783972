"""Weights & Biases: an artifact per format that agrees with PyTorch, tables over all checkpoints, registry links.

https://docs.wandb.ai/guides/artifacts, https://docs.wandb.ai/guides/registry

Requirements:
* W&B may be slow, refuse or be down: publishing takes at most `timeout` seconds, and what was not uploaded is reported.
  Uploads are waited for, since W&B reports a failure only to a caller that waits.
* A table is logged whole each time: W&B shows only the first state of one that grows.
* Nothing is logged with `step=`: Lightning's logger has its own steps, and W&B drops what comes late.
* Nothing is left in the user's home, where W&B would stage a copy of each file. Online, artifacts are read from the
  export. Offline the run's own folder gets hard links to them: `wandb sync` finds those after the export was pruned,
  and they are removed with the run's folder. What W&B stages for tables is in the run's folder too, unless
  `WANDB_DATA_DIR` is set; W&B's cache, which it prunes itself, keeps some kilobytes of tables.
* Only `verified` artifacts are linked to the registry. W&B cannot link offline (it would log the artifact twice), so
  the export stores its links for `link`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from polyexport.errors import BadRequest, line
from polyexport.report import folders
from polyexport.report.card import description
from polyexport.report.compare import Bounds, compare
from polyexport.report.manifest import MANIFEST
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report, figures, history
from polyexport.report.tables import Figure
from polyexport.serialization import decode, encode, read_json, write_json

LINKS = "wandb_links.json"
"""File in an export's folder with the registry links of an offline run."""

_PAGE = "report.html"
_SUMMARY = ("state", "bytes", "max_abs_error", "batch", "p50_ms", "p95_ms", "batch_1_p50_ms", "speedup")
_BARS = ("p50_ms", "batch_1_p50_ms", "bytes")
_LINES = ("p50_ms", "max_abs_error")


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


@dataclass(frozen=True, slots=True)
class Link:
    """A registry link that an offline run could not make. `digest` identifies the version, which has no number yet."""

    artifact: str
    digest: str
    target: str
    aliases: tuple[str, ...]
    project: str
    entity: str | None = None


def link(folder: Path) -> tuple[str, ...]:
    """Make the registry links that offline runs stored in the exports under `folder`, after `wandb sync`.

    Returns:
        Each link: `<collection>:<alias> <- <artifact>`.

    Raises:
        BadRequest: there are none, or an artifact is not in W&B, or was replaced there by a newer version.
    """
    import wandb as sdk

    files = sorted({path.resolve() for path in (folder / LINKS, *folder.rglob(LINKS)) if path.exists()})
    if not files:
        raise BadRequest(f"{folder} has no stored registry links; an offline run writes {LINKS} into its export")
    api, made = sdk.Api(), []
    for file in files:
        for each in [decode(Link, data) for data in read_json(file)]:
            name = f"{each.entity or api.default_entity}/{each.project}/{each.artifact}:best"
            try:
                artifact = api.artifact(name, type="model")
            except (sdk.errors.CommError, ValueError) as error:
                raise BadRequest(f"W&B has no {name}; upload the run with `wandb sync` first ({error})") from error
            if artifact.digest != each.digest:
                raise BadRequest(f"{name} is not what was exported into {file.parent}, but a newer version")
            artifact.link(each.target, aliases=list(each.aliases))
            made.append(f"{each.target}:{each.aliases[0]} <- {name}")
        file.unlink()
    return tuple(made)


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
    promised = ("figures", *uploads, *([_PAGE] if exports else []))
    left |= dict.fromkeys(promised, f"not finished after {options.timeout:g} s")
    with _telling(left, "figures"), _staging(run):
        _log_figures(run, reports)
    if options.alert:
        with _telling(left, "alert"):
            _alert(run, reports)
    if not exports:
        return
    if options.source and not run.offline:
        with _telling(left, options.source):
            options = options.replaced(source=_use_checkpoint(options.source, run, newest))
    sent = _log_artifacts(options, run, uploads, newest, left)
    page = None
    with _telling(left, _PAGE, done=False):
        page = _log_page(options, run, newest)
    links: list[Link] = []
    for what, artifact in sent.items():
        report, outcome = uploads[what]
        with _telling(left, what):
            links += _arrived(options, run, outcome, artifact, deadline, newest=report is newest)
    if page is not None:
        with _telling(left, _PAGE):
            if not run.offline:
                _wait(page, deadline)
    if links:
        with _telling(left, LINKS):
            write_json(newest.folder / LINKS, links)


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


def _arrived(
    options: Wandb, run: Any, outcome: Outcome, artifact: Any, deadline: float, *, newest: bool
) -> Iterator[Link]:
    """Wait for an artifact and link it; offline, yield the link to be stored."""
    target = _link(options, run, outcome, artifact) if newest else None
    if run.offline:
        yield from [target] if target else []
        return
    _wait(artifact, deadline)
    if newest and options.old_ttl_days is not None:
        _expire_predecessor(artifact, options.old_ttl_days)
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


# --- figures ----------------------------------------------------------------------------------------------------------


def _log_figures(run: Any, reports: Sequence[Report]) -> None:
    import wandb as sdk

    report = reports[-1]
    newest = figures(report)
    for row in newest:
        for key in _SUMMARY:
            name = f"export/{row['format']}/{key}"
            if row[key] is not None or run.summary.get(name) is not None:  # of an earlier export, not of this one
                run.summary[name] = row[key]
    run.summary["export/notes"] = "\n".join(map(str, report.notes))
    best = report.best()
    run.summary["export/best_format"] = best.format if best else None

    latency = [_about(each) | row for each in reports for row in figures(each)]
    parity = [_about(each) | row for each in reports for row in _parity(each)]
    step = report.checkpoint.global_step or 0
    logged: dict[str, Any] = {"trainer/global_step": step, "export/latency": _table(latency)}
    if parity:
        logged["export/parity"] = _table(parity)
    for key in _BARS:
        bars = [{"format": row["format"], key: row[key]} for row in newest if row[key] is not None]
        if bars:
            batch = f" at batch {report.baseline.batch}" if key == "p50_ms" and report.baseline else ""
            logged[f"export/{key}"] = sdk.plot.bar(_table(bars), "format", key, title=f"{key}{batch}, step {step}")
    for key in _LINES:
        lines: dict[str, list[tuple[Figure, Figure]]] = {}
        for row in latency:
            if row[key] is not None and row["global_step"] is not None:
                lines.setdefault(str(row["format"]), []).append((row["global_step"], row[key]))
        if lines:
            xs, ys = ([[point[axis] for point in line] for line in lines.values()] for axis in (0, 1))
            batch = f" at batch {report.baseline.batch}" if key == "p50_ms" and report.baseline else ""
            title = f"{key}{batch} over checkpoints"
            logged[f"export/{key}_by_step"] = sdk.plot.line_series(xs, ys, list(lines), title, "global_step")
    run.log(logged)


def _about(report: Report) -> dict[str, Figure]:
    checkpoint = report.checkpoint
    name = Path(checkpoint.path).name
    score: float | None = encode(checkpoint.score)
    return {"checkpoint": name, "global_step": checkpoint.global_step, "score": score}


def _parity(report: Report) -> Iterator[dict[str, Figure]]:
    """One row per format and output."""
    for outcome in report.outcomes:
        for output, parity in outcome.parity.outputs.items() if outcome.parity else ():
            about = {
                "format": outcome.format,
                "precision": outcome.precision,
                "state": outcome.shown_state,
                "output": output,
            }
            yield about | encode(parity)


def _table(rows: Sequence[Mapping[str, Figure]]) -> Any:
    import wandb as sdk

    # None if it is not a number, since a W&B column has one type
    return sdk.Table(columns=list(rows[0]), data=[list(encode(row).values()) for row in rows])


def _is_fastest(outcome: Outcome, report: Report) -> bool:
    return outcome is report.fastest


# --- artifacts --------------------------------------------------------------------------------------------------------


def _log_artifact(options: Wandb, run: Any, report: Report, outcome: Outcome, *, newest: bool) -> Any:
    import wandb as sdk

    name = _word(f"model-{run.id}-{outcome.format}")
    artifact = sdk.Artifact(name, "model", description(report), metadata=_metadata(options, report, outcome))
    days = options.ttl_days if newest else options.old_ttl_days or options.ttl_days
    if days is not None:
        artifact.ttl = timedelta(days=days)
    folder = report.folder / outcome.format
    _add(artifact, run, report, folder, [path for path in folder.rglob("*") if path.is_file()])
    aliases = ["latest", "best", "parity-passed"]
    if newest:
        aliases += options.aliases
        if _is_fastest(outcome, report):
            aliases.append("fastest")
    tags = [_word(word) for word in (outcome.format, outcome.precision, outcome.shown_state)] + list(options.tags)
    return run.log_artifact(artifact, aliases=list(dict.fromkeys(aliases)), tags=list(dict.fromkeys(tags)))


def _log_page(options: Wandb, run: Any, report: Report) -> Any:
    """Upload the report as a page, as Markdown and as JSON."""
    import wandb as sdk

    about = {"notes": list(map(str, report.notes)), "checkpoint_sha256": report.checkpoint.sha256}
    artifact = sdk.Artifact(_word(f"report-{run.id}"), type="report", metadata=encode(about))
    if options.ttl_days is not None:
        artifact.ttl = timedelta(days=options.ttl_days)
    files = [report.folder / name for name in (_PAGE, "report.md", "report.json", MANIFEST)]
    _add(artifact, run, report, report.folder, [file for file in files if file.exists()])
    return run.log_artifact(artifact, aliases=["latest", "best"])


def _add(artifact: Any, run: Any, report: Report, folder: Path, files: Sequence[Path]) -> None:
    """Add files under their paths in `folder`; offline as hard links, since finished exports never change."""
    for file in sorted(files):
        there = file
        if run.offline:  # next to the run's `files`, which W&B uploads completely
            there = Path(run.dir).parent / "exports" / report.folder.name / file.relative_to(report.folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            folders.link(file, there)
        artifact.add_file(str(there), name=file.relative_to(folder).as_posix(), skip_cache=True, policy="immutable")


def _word(text: str) -> str:
    """`text` in characters that W&B allows in names, tags and aliases."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:128]


def _use_checkpoint(source: str, run: Any, report: Report) -> str:
    """Make the checkpoint's artifact an input of the run; returns its name, with its version if that is known.

    A name without a version is an artifact of this run: its `best`, if that has this checkpoint. Lightning may log it
    later, when the run ends; then there is no lineage.
    """
    import wandb as sdk

    if ":" in source:
        run.use_artifact(source)
        return source
    try:
        found = sdk.Api().artifact(f"{run.entity}/{run.project}/{source}:best", type="model")
    except (sdk.errors.CommError, ValueError):
        return source
    if found.metadata.get("original_filename") != Path(report.checkpoint.path).name:
        return source
    run.use_artifact(found)
    return f"{run.entity}/{run.project}/{source}:{found.version}"


def _expire_predecessor(artifact: Any, days: float) -> None:
    """Set the time to live of the previous version."""
    import wandb as sdk

    number = int(artifact.version.removeprefix("v"))
    if number:
        name = artifact.name.partition(":")[0]
        older = sdk.Api().artifact(f"{artifact.entity}/{artifact.project}/{name}:v{number - 1}")
        older.ttl = timedelta(days=days)
        older.save()


def _link(options: Wandb, run: Any, outcome: Outcome, artifact: Any) -> Link | None:
    """The registry link of an artifact; None if it has none."""
    if options.registry is None or outcome.state != "verified":
        return None
    registry, _, collection = options.registry.partition("/")
    target = f"wandb-registry-{registry}/{collection or _word(run.project)}-{_word(outcome.format)}"
    return Link(artifact.name, artifact.digest, target, ("best",), run.project, run.entity or None)


def _metadata(options: Wandb, report: Report, outcome: Outcome) -> dict[str, Any]:
    """The metadata of an artifact: nested, since W&B allows 100 top-level keys, and without infinities."""
    latency = encode(outcome.latency)
    if latency is not None:
        del latency["samples_ms"]  # report.json has them; here they would hide the rest
    checkpoint = report.checkpoint
    metadata: dict[str, Any] = encode(
        {
            "format": outcome.format,
            "precision": outcome.precision,
            "state": outcome.shown_state,
            "reason": outcome.reason,
            "remark": outcome.remark,
            "outside": outcome.outside,
            "route": outcome.route,
            "bytes": outcome.artifact.bytes if outcome.artifact else None,
            "sha256": outcome.artifact.sha256 if outcome.artifact else None,
            "source_artifact": options.source,
            "checkpoint_sha256": checkpoint.sha256,
            "original_filename": Path(checkpoint.path).name,
            "epoch": checkpoint.epoch,
            "global_step": checkpoint.global_step,
            "monitor": checkpoint.monitor,
            "score": checkpoint.score,
            "inputs": outcome.inputs,
            "outputs": outcome.outputs,
            "parity": outcome.parity,
            "toolchain": outcome.toolchain,
            "environment": report.environment,
            "notes": list(map(str, report.notes)),
        }
    )
    return metadata | {"latency": latency}
