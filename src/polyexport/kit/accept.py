"""The proof that a kit wrote, added to the report of the export that the kit was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from polyexport.errors import BadRequest
from polyexport.formats import known
from polyexport.kit.prove import VERSION
from polyexport.load import Description
from polyexport.measure.reference import VALIDATION_BATCH
from polyexport.measure.verification import fingerprint, sha256
from polyexport.report import manifest
from polyexport.report.files import save
from polyexport.report.folders import BEST, DESCRIPTION, check_links, followed, inside
from polyexport.report.outcome import STATES, Artifact, Judgement, Outcome, Proof, lacking
from polyexport.report.report import Report
from polyexport.serialization import read_record, write_json


def accept(path: Path, where: Path = Path()) -> tuple[Report, str]:
    """Add `proof.json` to the report of its export.

    Args:
        path: The `proof.json`.
        where: The export, or a folder that contains it at any depth.

    Returns:
        The report, saved, and the format that was proven.

    Raises:
        BadRequest: it is not a proof of this version, or not of an artifact in `where`; or the artifact, the data or
            the tolerance is not the export's.
    """
    if not path.exists():
        raise BadRequest(f"there is no {path}; give the proof.json that a kit wrote")
    proof = read_record(Proof, path, VERSION)
    report = _export(proof, where)
    check_links(report.folder)
    outcome = report[proof.format]
    _check(report, outcome, proof)
    proven = settled(outcome, proof)
    count, found = fingerprint(report.folder / proof.format, DESCRIPTION)
    made = proven.artifact or Artifact(proof.format, count, found)
    proven = replace(proven, artifact=replace(made, bytes=count, sha256=found))
    report = replace(report, outcomes=tuple(proven if each is outcome else each for each in report.outcomes))
    about = read_record(Description, report.folder / proof.format / DESCRIPTION)
    about = Description.of(proven, about.checkpoint, about.spec)
    write_json(report.folder / proof.format / DESCRIPTION, about)
    save(report)
    return report, proof.format


def settled(outcome: Outcome, proof: Proof) -> Outcome:
    """The outcome with one more proof, which replaces an earlier one by the same runtime on the same machine.

    Its state is the worst that was found anywhere. What only a stand-in found here counts no more, nor does a state
    that it had because it was not run.
    """
    here = outcome.here or Judgement(outcome.state, outcome.reason, outcome.parity)
    ran_here = here.parity is not None and not here.parity.off_device
    proofs = (*(each for each in outcome.proofs if each.verified_by != proof.verified_by), proof)
    without = [Judgement("degraded", lacking(outcome.outside), None)] if outcome.outside else []
    judged_here = [here] if ran_here or here.state == "degraded" else []
    judgements = [*judged_here, *(proof.judgement for proof in reversed(proofs)), *without]
    worst = max(judgements, key=lambda each: STATES.index(each.state))
    parity = here.parity if ran_here else worst.parity or proof.parity
    if (own := proof.signature) is not None:
        outcome = replace(outcome, inputs=own.inputs, outputs=own.outputs)
    return replace(outcome, state=worst.state, reason=worst.reason, parity=parity, proofs=proofs, here=here)


def _check(report: Report, outcome: Outcome, proof: Proof) -> None:
    """Refuse a proof with other data or another tolerance than the export's."""
    exported = manifest.load(report.folder).of(proof.format)
    known_files = {*(batch.path for batch in exported.batches), exported.noise} - {""}
    needed = {exported.batches[0].path}
    differing = [
        file
        for file, found in proof.data.items()
        if file not in known_files or sha256(inside(report.folder, file)) != found
    ]
    if differing or not needed <= proof.data.keys():
        what = ", ".join(differing) or ", ".join(needed - proof.data.keys())
        raise BadRequest(f"the proof of {proof.format} was made with other data than {report.folder} has: {what}")
    each = known().get(proof.format)
    if each is None or proof.tolerance != each.limits:
        raise BadRequest(
            f"the proof of {proof.format} was judged by another tolerance than this version has; make the kit again"
        )


def _export(proof: Proof, where: Path) -> Report:
    """The export with the artifact that was proven."""
    found = [folder for folder in _exports(where) if _holds(folder, proof)]
    if len(found) > 1:  # loggers have copies, without the batch
        found = [folder for folder in found if (folder / VALIDATION_BATCH).is_file()] or found
    if not found:
        raise BadRequest(
            f"no export in {where.absolute()} has a {proof.format} with SHA-256 {proof.sha256[:12]}…: "
            "the artifact was changed, or the export is in another folder; give that"
        )
    if len(found) > 1:
        raise BadRequest(f"several exports have that {proof.format}; give one of them: {', '.join(map(str, found))}")
    return Report.load(found[0])


def _exports(where: Path) -> Iterator[Path]:
    """`where` if it is an export, or its best export, or all exports below it."""
    for folder in (where, followed(where / BEST)):
        if (folder / "report.json").is_file():
            yield folder.resolve()
            return
    yield from sorted({file.parent.resolve() for file in where.rglob("report.json")})


def _holds(folder: Path, proof: Proof) -> bool:
    place = inside(folder, proof.format)
    return (place / DESCRIPTION).is_file() and fingerprint(place, DESCRIPTION)[1] == proof.sha256
