"""Weights & Biases: exports as artifacts.

Nothing is left in the user's home, where W&B would stage a copy of each file. Online, artifacts are read from the
export. Offline the run's own folder gets hard links to them: `wandb sync` finds those after the export was pruned, and
they are removed with the run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from polyexport.report import folders
from polyexport.report.card import description
from polyexport.report.manifest import MANIFEST
from polyexport.report.outcome import Outcome
from polyexport.report.report import Report
from polyexport.serialization import encode

PAGE = "report.html"


def of_format(run: Any, report: Report, outcome: Outcome, source: str | None) -> Any:
    """The artifact of one format's files, not logged yet; `source` is the artifact with the checkpoint."""
    import wandb as sdk

    name = word(f"model-{run.id}-{outcome.format}")
    artifact = sdk.Artifact(name, "model", description(report), metadata=_metadata(source, report, outcome))
    folder = report.folder / outcome.format
    _add(artifact, run, report, folder, [path for path in folder.rglob("*") if path.is_file()])
    return artifact


def of_report(run: Any, report: Report) -> Any:
    """The artifact of a report, as a page, as Markdown and as JSON, not logged yet."""
    import wandb as sdk

    about = {"notes": list(map(str, report.notes)), "checkpoint_sha256": report.checkpoint.sha256}
    artifact = sdk.Artifact(word(f"report-{run.id}"), type="report", metadata=encode(about))
    files = [report.folder / name for name in (PAGE, "report.md", "report.json", MANIFEST)]
    _add(artifact, run, report, report.folder, [file for file in files if file.exists()])
    return artifact


def expire(artifact: Any, days: float | None) -> None:
    """Set after how many days W&B may delete an artifact; with None its team decides."""
    if days is not None:
        artifact.ttl = timedelta(days=days)


def use_checkpoint(source: str, run: Any, report: Report) -> str:
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


def expire_predecessor(artifact: Any, days: float) -> None:
    """Set the time to live of the previous version."""
    import wandb as sdk

    number = int(artifact.version.removeprefix("v"))
    if number:
        name = artifact.name.partition(":")[0]
        older = sdk.Api().artifact(f"{artifact.entity}/{artifact.project}/{name}:v{number - 1}")
        expire(older, days)
        older.save()


def _metadata(source: str | None, report: Report, outcome: Outcome) -> dict[str, Any]:
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
            "source_artifact": source,
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


def word(text: str) -> str:
    """`text` in characters that W&B allows in names, tags and aliases."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:128]
