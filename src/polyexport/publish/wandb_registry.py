"""Weights & Biases: links of verified artifacts in the registry.

W&B cannot link offline (it would log the artifact twice), so the export of an offline run stores its links for `link`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest
from polyexport.publish.wandb_artifacts import word
from polyexport.report.outcome import Outcome
from polyexport.serialization import decode, read_json, write_json

LINKS = "wandb_links.json"
"""File in an export's folder with the registry links of an offline run."""


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


def link_of(registry: str | None, run: Any, outcome: Outcome, artifact: Any) -> Link | None:
    """The registry link of a logged artifact; None if it has none."""
    if registry is None or outcome.state != "verified":
        return None
    name, _, collection = registry.partition("/")
    target = f"wandb-registry-{name}/{collection or word(run.project)}-{word(outcome.format)}"
    return Link(artifact.name, artifact.digest, target, ("best",), run.project, run.entity or None)


def store(links: Sequence[Link], folder: Path) -> None:
    """Write the links of an offline run into its export."""
    if links:
        write_json(folder / LINKS, links)
