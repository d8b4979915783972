"""`report.html`: the report as one self-contained page.

Requirements:
* One file of some ten kilobytes: no library, no network (its content security policy forbids it), and only a script for
  sorting and copying.
* Readable on a phone, in dark mode, by keyboard, by a screen reader and in print; color alone has no meaning.
* Names from users are escaped everywhere.

The pictures are SVG from `polyexport.report.svg`, since a page is written for each new best, and a charting library
would add megabytes to each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from polyexport.capture.processing import part
from polyexport.format import Snippet
from polyexport.formats import known
from polyexport.measure.budget import losses
from polyexport.measure.reference import VALIDATION_BATCH
from polyexport.report import svg
from polyexport.report.choice import choices
from polyexport.report.escape import printable
from polyexport.report.outcome import STATES, Outcome
from polyexport.report.report import Report, columns, eager, history, metrics, proofs, rounds, rows
from polyexport.report.svg import Point
from polyexport.report.tables import NUMBERS, embedded, error, layers, milliseconds, size

if TYPE_CHECKING:
    from jinja2 import Environment

HISTORY = 30
"""How many exports of a run the page lists."""


def page(report: Report) -> str:
    """The whole page, without control characters, since it may be printed too."""
    return printable(
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            title=title(report),
            states=_tally(report),
            columns=_columns(report),
            numbers=NUMBERS,
            table=list(_table(report)),
            metrics=metrics(report),
            choices=list(choices(report)),
            embedded=embedded(report.model, report.outcomes) if report.model else "",
            proofs=proofs(report),
            rounds=[(outcome, rounds(report, outcome)) for outcome in report.outcomes if outcome.rounds],
            layers=[(outcome, layers(outcome.layers)) for outcome in report.outcomes if outcome.layers],
            highlights=list(_highlights(report)),
            pictures=list(_pictures(report)),
            history=_history(report),
            snippets=[(outcome, snippets(outcome)) for outcome in report.outcomes if outcome.artifact],
            browser_page=browser_page,
            graph=graph,
        )
    )


def _tally(report: Report) -> Mapping[str, int]:
    """How many formats ended in which state, the best state first."""
    return Counter(o.shown_state for o in sorted(report.outcomes, key=lambda o: (STATES.index(o.state), o.shown_state)))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("polyexport.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"ms": milliseconds, "error": error, "size": size, "title": title}
    return made


def title(report: Report) -> str:
    """The checkpoint's name, or the module's if the weights are not from a file."""
    if report.checkpoint.path:
        return Path(report.checkpoint.path).name.removesuffix(".ckpt")
    return report.model.class_name.rpartition(".")[2] if report.model else "export"


# --- what the template shows ------------------------------------------------------------------------------------------


def _columns(report: Report) -> list[str]:
    """The columns of the table that have a value in any row; reasons have rows of their own."""
    return [name for name in columns(report) if name != "reason" and any(row[name] for row in rows(report))]


def _table(report: Report) -> Iterator[tuple[Outcome, Mapping[str, str]]]:
    baseline = eager(report)
    yield from zip([*([baseline] if baseline else []), *report.outcomes], rows(report), strict=True)


@dataclass(frozen=True, slots=True)
class Highlight:
    """A key result at the top of the page."""

    label: str
    figure: str
    about: str


def _highlights(report: Report) -> Iterator[Highlight]:
    yield Highlight(
        "Agree with PyTorch", f"{len(report.publishable)} of {len(report.outcomes)}", "formats, run on real data"
    )
    front = report.pareto()
    if not front:
        return
    fastest = report.fastest
    if fastest and fastest.latency:
        factor = f", {fastest.latency.speedup:.2f}× PyTorch" if fastest.latency.speedup else ""
        yield Highlight("Fastest", fastest.format, f"{milliseconds(fastest.latency.p50_ms)} ms{factor}")
    small = min((o for o in front if o.artifact), key=lambda o: o.artifact.bytes if o.artifact else 0)
    yield Highlight("Smallest", small.format, size(small.artifact.bytes if small.artifact else None))
    errors = {o.format: o.parity.max_abs_error for o in front if o.parity and o.parity.max_abs_error is not None}
    if errors:
        close = min(errors, key=lambda name: errors[name])
        yield Highlight("Closest", close, f"max error {error(errors[close])}" if errors[close] else "bit-equal")


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG with its heading and how to read it."""

    title: str
    about: str
    svg: str


def _pictures(report: Report) -> Iterator[Picture]:
    timed = [outcome for outcome, _ in _table(report) if outcome.latency]
    if timed:
        samples = {o.format: o.latency.samples_ms for o in timed if o.latency}
        yield Picture(
            "Latency",
            "Every timed call; box: quartiles, whiskers: 5 to 95 %. Logarithmic; lower is better.",
            svg.boxes(samples, _ms),
        )
    judged = [outcome for outcome in report.outcomes if outcome.parity and _is_drawable(outcome.parity.max_abs_error)]
    if judged:
        errors = {o.format: (o.parity.max_abs_error or 0.0, o.parity.noise_floor) for o in judged if o.parity}
        yield Picture(
            "Error against noise floor",
            "Dot: largest difference from PyTorch; line: the effect of float32 rounding alone on PyTorch.",
            svg.dots(errors, _error),
        )
    made = {o.format: float(o.artifact.bytes) for o in report.outcomes if o.artifact and o.artifact.bytes}
    if made:
        yield Picture("Size", "Of all files of the format that have to be shipped.", svg.bars(made, _bytes))
    yield from _choice(report)
    for outcome in (each for each in report.outcomes if each.rounds):
        yield from (_rounds(report, outcome, name) for name in report.budget)


def _is_drawable(error: float | None) -> bool:
    return error is not None and math.isfinite(error)


def _choice(report: Report) -> Iterator[Picture]:
    """Latency against size and error, for the artifacts to choose from."""
    best = report.best()
    candidates = [o for o in report.outcomes if o.state == "verified" and o.latency and o.artifact and o.parity]
    if len(candidates) < 2 or not report.is_quiet:
        return
    for column, better, say in (("size", "smaller", _bytes), ("max error", "closer", _error)):
        points = [
            Point(o.format, o.latency.p50_ms, NUMBERS[column](o) or 0.0, o is best) for o in candidates if o.latency
        ]
        about = f"Verified formats. Filled: none is both faster and {better}. Ring: the fastest. Lower left is best."
        drawn = svg.plane(points, "p50 latency", column, _ms, say)
        yield Picture(f"Latency against {column}", about, drawn)


def _rounds(report: Report, outcome: Outcome, name: str) -> Picture:
    """What the rounds of a format cost in size, and what they lose of a metric."""
    lost = [losses(report.budget, report.metrics, each.metrics)[name] for each in outcome.rounds]
    points = [
        Point(f"{each.share:.1%} in float", float(each.bytes), max(loss, 0.0), each.chosen)
        for each, loss in zip(outcome.rounds, lost, strict=True)
        if loss is not None
    ]
    about = "Artifacts tried since the first was outside the budget. Ring: the one that stayed. Lower left is best."
    drawn = svg.plane(points, "size", f"{name} lost", _bytes, "{:.2g}".format) if points else ""
    return Picture(f"{outcome.format}: size against {name}", about, drawn)


def _ms(value: float) -> str:
    return f"{milliseconds(value)} ms"


def _error(value: float) -> str:
    return error(value).replace(".0e", "e")


def _bytes(value: float) -> str:
    return size(round(value))


@dataclass(frozen=True, slots=True)
class History:
    """The exports of a run, the oldest first; `picture` draws the score, if there is one."""

    reports: Sequence[Report]
    formats: Sequence[str]
    picture: Picture | None


def _history(report: Report) -> History | None:
    """This export and earlier ones of the same run; None if there are none."""
    found = history(report)[-HISTORY:]
    if len(found) < 2:
        return None
    formats = list(dict.fromkeys(outcome.format for each in found for outcome in each.outcomes))
    monitor = report.checkpoint.monitor
    scores = [
        (float(each.checkpoint.global_step or 0), each.checkpoint.score, title(each), f"{each.checkpoint.score:.6g}")
        for each in found
        if each.checkpoint.score is not None and each.checkpoint.monitor == monitor
    ]
    picture = None
    if monitor and len(scores) > 1:
        curve = svg.curve(scores, "global step", monitor)
        picture = Picture(f"{monitor} of the exported checkpoints", "Ring: the newest.", curve)
    return History(found, formats, picture)


def snippets(outcome: Outcome) -> tuple[Snippet, ...]:
    """Code that loads the artifact, with its names and shapes; none for a user's own format."""
    each = known().get(outcome.format)
    if each is None or outcome.artifact is None:
        return ()
    behind = f"{part(outcome.outside)}/" if "preprocess" in outcome.outside else ""
    about: Mapping[str, Any] = {
        "path": outcome.artifact.path,
        "batch": f"{behind}{VALIDATION_BATCH}",
        "inputs": [replace(tensor, shape=tensor.sized(lambda _: 1)) for tensor in outcome.inputs],
        "names": [tensor.name for tensor in outcome.inputs],
        "outputs": [tensor.name for tensor in outcome.outputs],
        "output_dtypes": [tensor.dtype for tensor in outcome.outputs],
        "output_shapes": [tensor.sized(lambda _: 1) for tensor in outcome.outputs],
    }
    return tuple(replace(snippet, code=_plain().from_string(snippet.code).render(about)) for snippet in each.snippets)


def browser_page(outcome: Outcome) -> str:
    """The page that runs the artifact in a browser, relative to the export's folder; empty if there is none."""
    each = known().get(outcome.format)
    if each is None or outcome.artifact is None or not each.page:
        return ""
    return PurePosixPath(outcome.artifact.path).with_name(each.page).as_posix()


def graph(outcome: Outcome) -> str:
    """The file of the artifact that Netron draws, relative to the export's folder; empty if there is none."""
    each = known().get(outcome.format)
    return f"{each.name}/{each.graph}" if each and outcome.artifact and each.graph else ""


@cache
def _plain() -> Environment:
    from jinja2 import Environment

    return Environment(autoescape=False)  # a snippet is code; the page escapes the result
