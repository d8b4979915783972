"""Names, reasons and notes may have any content: terminals do not obey it, and Markdown shows it as it is."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from polyexport import BadRequest, Outcome, Report
from polyexport.cli import app
from polyexport.report import console, escape, folders, svg
from polyexport.report.files import save
from polyexport.report.html import page
from polyexport.report.outcome import Checkpoint, notes
from polyexport.report.report import markdown
from polyexport.report.tables import sentence

CLEAR = "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://evil\x1b\\"
REVERSED = "\u202egnp.exe\u2066"


def hostile() -> Report:
    reason = f"{CLEAR}a|b `c` <img src=x> [link](http://evil) __init__ {REVERSED}\nsecond [red]line[/red]"
    outcomes = (
        Outcome(f"on{CLEAR}nx", "float32", "failed", reason, route=f"r{REVERSED}", reproduce="true\n```\n# gone"),
    )
    metrics = {f"acc{CLEAR}|[b]": 0.5}
    about = Checkpoint(f"a`b{CLEAR}.ckpt", monitor=f"m{CLEAR}", score=1.0, epoch=1)
    return Report(about, None, outcomes, notes=notes("batch", reason), metrics=metrics, folder=Path(f"/tmp/{CLEAR}x"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – text é 中文", "plain – text é 中文"),
        ("\x1b[31mred\x1b[0m", "red"),
        (f"{CLEAR}after", "after"),
        ("\x1b]0;never ended", ""),
        (REVERSED, "gnp.exe"),
        ("bell\x07 nul\x00 back\x08 csi\x9b31m", "bell nul back csi31m"),
        ("two\nlines\tand a tab\r", "two\nlines\tand a tab"),
        ("line\u2028separator", "line separator"),
        ("me\u200cun \u200b\ufeff", "me\u200cun "),
        ("\udcff", "\ufffd"),
    ],
)
def test_control_characters_do_not_reach_the_terminal(text: str, shown: str) -> None:
    assert escape.printable(text) == shown


def test_what_is_printed_of_a_report_is_printable() -> None:
    stream = io.StringIO()
    screen = Console(file=stream, width=200, no_color=True)
    report = hostile()
    measured = tuple(replace(outcome, metrics=report.metrics) for outcome in report.outcomes)
    console.show(replace(report, outcomes=measured), screen)
    console.say(screen, sentence(hostile().outcomes[0]))
    printed = stream.getvalue() + page(report)
    assert printed == escape.printable(printed)
    assert "[red]line[/red]" in printed  # no markup of the terminal's library either


def test_a_terminal_of_another_encoding_shows_what_it_has() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console.show(replace(hostile(), folder=Path("/tmp/é")), Console(file=stream, width=200))
    stream.flush()
    assert b"export: /tmp/?" in stream.buffer.getvalue()


def test_markdown_shows_names_and_reasons_as_they_are() -> None:
    from markdown_it import MarkdownIt

    text = markdown(hostile())
    assert text == escape.printable(text)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<img" not in html
    assert "<a " not in html
    assert "<strong>" not in html
    assert "a|b `c` &lt;img src=x&gt; [link](http://evil) __init__ gnp.exe second [red]line[/red]" in html
    assert "<code>a`b.ckpt</code>" in html
    assert html.count("<td>") == len(hostile().outcomes) * html.split("</tr>")[0].count("<th>") + 2
    assert "# gone" in html.split("<pre>")[1]


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 2, "seconds": 1' + "0" * 400 + "}",
        '{"version": 2, "checkpoint": {"path": "", "epoch": 1' + "0" * 400 + "}}",
        "[" * 100_000,
        "9" * 5000,
    ],
    ids=["a number", "an integer", "lists", "digits"],
)
def test_a_report_beyond_all_measure_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in done.stderr


@pytest.mark.parametrize("named", ["/etc", "..", "../x", "\x00", "", "x" * 300])
def test_a_best_that_is_a_file_names_a_folder_next_to_it(tmp_path: Path, named: str) -> None:
    (tmp_path / "best").write_text(named)
    assert folders.followed(tmp_path / "best") == tmp_path / "best"


def test_the_picture_of_errors_has_an_axis_for_every_float() -> None:
    assert "svg" in svg.dots({"onnx": (1e308, 1e-9), "tflite": (float("inf"), None)}, str)


@pytest.mark.parametrize("field", ["format", "log", "artifact"])
@pytest.mark.parametrize("path", ["../other", "/etc/passwd", "onnx/../../other", "away/model", "\x00", "\ud800"])
def test_a_report_that_names_files_elsewhere_is_refused(tmp_path: Path, field: str, path: str) -> None:
    folder = tmp_path / "export"
    report = replace(hostile(), folder=folder)
    folder.mkdir()
    (folder / "away").symlink_to(tmp_path)
    save(report)
    assert Report.load(folder).outcomes[0].log is None
    blob = json.loads((folder / "report.json").read_text())
    blob["outcomes"][0][field] = {"path": path, "bytes": 1, "sha256": ""} if field == "artifact" else path
    (folder / "report.json").write_text(json.dumps(blob))
    with pytest.raises(BadRequest, match="is outside of the export"):
        Report.load(folder)
