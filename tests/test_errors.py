"""An exception as the reason that a user reads."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

import polyexport
from polyexport import errors
from polyexport.errors import line, redacted
from polyexport.workers.process import Workers


def checks(kind: str) -> None:
    if kind not in ("float32", "float16"):
        raise AssertionError


def quits(code: int) -> None:
    sys.exit(code)


WORDLESS = {
    "AssertionError at `raise AssertionError`": lambda: checks("bfloat16"),
    "KeyError: 'bfloat16' at `": lambda: {"float32": 1}["bfloat16"],
    "IndexError: list index out of range at `": lambda: [1][1],
    "SystemExit: 3 at `sys.exit(": lambda: quits(3),
}


@pytest.mark.parametrize(("begins", "fails"), WORDLESS.items(), ids=[name.split(" ")[0] for name in WORDLESS])
def test_an_exception_without_a_message_gets_the_line_that_raised_it(begins, fails):
    try:
        fails()
    except BaseException as error:
        said = line(error)
    assert said.startswith(begins)
    assert "in " in said.rsplit("(", 1)[1]


def test_an_exit_gets_the_line_that_asked_for_it_behind_a_librarys_own_exit(monkeypatch):
    leave = sys.exit

    class Hooks:
        def exit(self, code: int) -> None:
            leave(code)

    monkeypatch.setattr(sys, "exit", Hooks().exit)
    with pytest.raises(SystemExit) as caught:
        quits(3)
    assert line(caught.value).startswith("SystemExit: 3 at `sys.exit(code)` (test_errors.py:")


def test_an_exceptions_message_is_left_as_it_is():
    with pytest.raises(ValueError, match="axis") as caught:
        raise ValueError("no  axis\n 3")
    assert line(caught.value) == "ValueError: no axis 3"


@pytest.mark.parametrize("cause", ["sizes differ", "select(): index 0\nis out of range"])
def test_the_cause_of_an_error_in_torchscript_is_behind_its_tracebacks(cause):
    traced = "Traceback of TorchScript, serialized code:\n  x = y\n      ~ <--- HERE\n\n"
    again = "Traceback of TorchScript, original code:\n/there.py(3): forward\n"
    error = RuntimeError(f"It failed in the interpreter.\n{traced}{again}RuntimeError: {cause}\n")
    assert line(error) == f"RuntimeError: {' '.join(cause.split())}"


def test_no_reason_is_only_the_name_of_an_exception():
    source = Path(polyexport.__file__).parent
    alone = [file for file in source.rglob("*.py") if "type(error).__name__" in file.read_text(encoding="utf-8")]
    assert alone == [source / "errors.py"]


def test_secrets_of_the_environment_and_passwords_in_urls_are_left_out_of_reasons(monkeypatch, tmp_path):
    for name, value in {
        "MY_API_KEY": "abcd-efgh-1234",
        "HF_TOKEN": "hf_0123456789",
        "KEYBOARD": "querty-layout",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("APP_CREDENTIALS", str(tmp_path))  # a path tells nothing
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    said = line(
        RuntimeError(
            f"no abc for hf_0123456789 at https://me:pass@host/x with abcd-efgh-1234, {tmp_path} querty-layout"
        )
    )
    assert said == f"RuntimeError: no abc for *** at https://***@host/x with ***, {tmp_path} querty-layout"
    assert redacted("s3://bucket/a:b@c") == "s3://bucket/a:b@c"


def test_secrets_of_the_environment_are_left_out_of_the_log_of_a_worker(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "abcd-efgh-1234")
    said = "import os; print('with', os.environ['MY_API_KEY'], flush=True)"
    log, workers = tmp_path / "log.txt", Workers()
    workers.run([sys.executable, "-c", said], tmp_path / "job.json", log, timeout=60, environment=os.environ)
    workers.end_all()
    assert log.read_text().splitlines()[-1] == f"with {'*' * 14}"


def test_warnings_that_would_be_raised_are_shown(monkeypatch, recwarn):
    monkeypatch.setattr(errors, "TOLERANT", True)
    warnings.filterwarnings("error", "old")
    before = list(warnings.filters)
    with errors.WarningsAllowed():
        warnings.warn("old news", DeprecationWarning, stacklevel=1)
        with errors.WarningsAllowed():
            warnings.filterwarnings("ignore", "of the user")
    assert [str(each.message) for each in recwarn] == ["old news"]
    assert [each[1].pattern for each in warnings.filters if each not in before] == ["of the user"]
    with pytest.raises(DeprecationWarning):
        warnings.warn("old news", DeprecationWarning, stacklevel=1)


def test_a_warning_of_ours_that_would_be_raised_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(errors, "TOLERANT", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors.warn("the disk is full")
    assert [each.getMessage() for each in caplog.records] == ["the disk is full"]
