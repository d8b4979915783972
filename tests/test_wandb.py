"""W&B over its own protocol, against a server on this machine: what is uploaded, and what is reported when that fails.

Each client is a process of its own, so that W&B's service ends with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import wandb_log
import written
from fake_wandb import FakeWandb
from polyexport import BadRequest, Checkpoint, Report
from polyexport.cli import app
from polyexport.publish.wandb import Wandb, publish_into
from polyexport.publish.wandb_registry import LINKS, link

UNSET = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")

CLIENT = """
import sys
from pathlib import Path
import wandb as sdk
from polyexport.report.report import Report, history
from polyexport.publish.wandb import Wandb

reports = history(Report.load(Path(sys.argv[1])))
def run(name="one"):
    return sdk.init(project="digits", id=name, resume="allow")
def publish(report, **options):
    try:
        Wandb(**options)(report)
    except Exception as error:
        print("told:", error)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the second of two exports of one run."""
    return written.run(tmp_path_factory.mktemp("run"))[-1].folder


class Client:
    def __init__(self, folder: Path, finished: Path) -> None:
        self.folder, self.finished, self.home = folder, finished, folder / "home"

    def environment(self, server: FakeWandb) -> dict[str, str]:
        bounds = {
            "WANDB_FINISH_TIMEOUT": "3",
            "WANDB_HTTP_TIMEOUT": "2",
            **{f"WANDB_X_{kind}_RETRY_MAX": "1" for kind in ("GRAPHQL", "FILE_TRANSFER", "FILE_STREAM")},
            **{f"WANDB_X_{kind}_RETRY_WAIT_MAX_SECONDS": "1" for kind in ("GRAPHQL", "FILE_TRANSFER", "FILE_STREAM")},
        }
        at = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local-" + "0" * 40, "WANDB_MODE": "online"}
        home = {"HOME": str(self.home), "WANDB_DIR": str(self.folder)}
        return {name: value for name, value in os.environ.items() if name not in UNSET} | bounds | at | home

    def command(self, body: str) -> list[str]:
        return [sys.executable, "-c", CLIENT + body, str(self.finished)]

    def __call__(self, server: FakeWandb, body: str, **env: str) -> str:
        """What the client prints; it must end well whatever the server does."""
        with (self.folder / "stderr").open("w") as errors:  # not a pipe: W&B's service may hold it a little longer
            done = subprocess.run(
                self.command(body),
                cwd=self.folder,
                env=self.environment(server) | env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=90,
                check=False,
            )
        assert done.returncode == 0, (self.folder / "stderr").read_text()
        return done.stdout

    def at_home(self) -> list[Path]:
        """Data that W&B left in the user's home, and models that it left in its cache."""
        files = [path for path in self.home.rglob("*") if path.is_file()]
        return [path for path in files if ".local" in path.parts or b" at epoch=" in path.read_bytes()]


@pytest.fixture
def client(tmp_path: Path, finished: Path) -> Client:
    return Client(tmp_path, finished)


def test_a_state_that_got_worse_is_an_alert_for_who_wants_one(client):
    worse = """
from dataclasses import replace
def now(outcome):
    return replace(outcome, state="mismatch", reason="off") if outcome.format == "good" else outcome
bad = replace(reports[-1], outcomes=tuple(map(now, reports[-1].outcomes)))
run()
publish(reports[-1], alert=True, upload=False)
publish(bad, upload=False)
publish(bad, alert=True, upload=False)
sdk.finish()
"""
    with FakeWandb() as server:
        printed = client(server, worse)
    assert (printed, server.errors, server.unknown) == ("", [], [])
    assert server.alerts == [("WARN", "epoch=1-step=8: exports got worse", "good: verified became mismatch: off")]


def test_what_agreed_is_uploaded_and_what_is_verified_is_linked(client, finished):
    with FakeWandb() as server:
        body = (
            'run(); publish(reports[-1], registry="model/numbers", tags=["digits"], aliases=["candidate"], ttl_days=30)'
        )
        printed = client(server, f"{body}\nsdk.finish()")
    assert (printed, server.errors, server.unknown) == ("", [], [])
    good, static = server.models
    assert (good.name, static.name) == ("model-one-good", "model-one-static")
    assert good.files == {"model.json": (finished / "good" / "model.json").read_bytes()}
    assert set(static.aliases) == {"latest", "best", "parity-passed", "candidate"}
    assert set(good.aliases) == {*static.aliases, "fastest"}
    assert good.tags == ["good", "float32", "verified", "digits"]
    assert "| good | verified | 22 B | 1.0e-06 |" in good.description
    assert "lost" not in good.description
    assert good.ttl_seconds == 30 * 24 * 3600
    metadata = json.loads(good.metadata)
    assert (metadata["checkpoint_sha256"], metadata["score"], metadata["latency"]["p50_ms"]) == ("abc", 2.0, 0.5)
    assert metadata["source_artifact"] is None
    (linked,) = server.links
    assert linked.source == "model-one-good"
    assert (linked.target, linked.aliases) == ("org-entity/wandb-registry-model/numbers-good", ["best"])
    (page,) = (each for each in server.artifacts if each.name == "report-one")
    assert set(page.files) >= {"report.html", "report.md", "report.json"}
    assert page.files["report.html"] == (finished / "report.html").read_bytes()
    assert "notes" in json.loads(page.metadata)
    assert client.at_home() == []
    assert not (finished / LINKS).exists()

    latency = server.table("export/latency")
    rows = [dict(zip(latency["columns"], row, strict=True)) for row in latency["data"]]
    assert [(row["global_step"], row["format"]) for row in rows] == [
        (step, name) for step in (4, 8) for name in ("eager", "good", "wrong", "static", "lost")
    ]
    assert [row["p50_ms"] for row in rows[5:]] == [0.5, 0.5, None, 0.4, None]
    assert [row["max_abs_error"] for row in rows[5:]] == [None, 1e-6, None, 1e-6, None]
    assert len(server.table("export/parity")["data"]) == 6
    panels = {key for row in server.history for key in row if key.endswith("_table")}
    assert panels == {f"export/{name}_table" for name in ("p50_ms", "bytes", "p50_ms_by_step", "max_abs_error_by_step")}
    assert (server.summary["export/best_format"], server.summary["export/wrong/state"]) == ("good", "mismatch")


def test_figures_of_a_busy_machine_move_no_alias_and_replace_earlier_ones(tmp_path):
    last = written.run(tmp_path / "run")[-1]
    client = Client(tmp_path, written.busy(last).folder)
    with FakeWandb() as server:
        body = 'run(); publish(reports[0]); publish(reports[-1], registry="model/numbers")\nsdk.finish()'
        printed = client(server, body)
    assert (printed, server.errors, server.unknown) == ("", [], [])
    assert ["fastest" in each.aliases for each in server.models if each.name == "model-one-good"] == [True, False]
    assert [each.aliases for each in server.links] == [["best"]]
    assert server.summary["export/notes"].startswith("latency was measured on a busy machine")
    timed = {key: server.summary[f"export/good/{key}"] for key in ("batch", "p50_ms", "batch_1_p50_ms")}
    assert timed == {"batch": 4, "p50_ms": 9.0, "batch_1_p50_ms": 2.0}
    assert server.summary.get("export/good/speedup") is None


def test_every_export_can_be_uploaded_and_old_ones_expire(client):
    body = """
run("one"); publish(reports[0]); publish(reports[-1], old_ttl_days=1); sdk.finish()
run("two"); publish(reports[-1], upload="all", old_ttl_days=1, source="me/digits/model-one-good:v1"); sdk.finish()
run("three"); publish(reports[-1], upload=False, registry="model"); sdk.finish()
"""
    with FakeWandb() as server:
        assert client(server, body) == ""
    assert (server.errors, server.unknown, server.links) == ([], [], [])
    found = [(each.name, each.index, each.ttl_seconds, "best" in each.aliases) for each in server.models]
    day = 24 * 3600
    assert sorted(found, key=lambda each: each[:2]) == [
        ("model-one-good", 0, day, False),
        ("model-one-good", 1, None, True),
        ("model-one-static", 0, day, False),
        ("model-one-static", 1, None, True),
        ("model-two-good", 0, day, False),
        ("model-two-good", 1, None, True),
        ("model-two-static", 0, day, False),
        ("model-two-static", 1, None, True),
    ]
    assert server.uses == ["model-one-good"]
    assert any(each.name.startswith("run-three-") for each in server.artifacts)


def test_lineage_leads_from_the_checkpoint_to_the_exports(client):
    """By its version; a `best` that is another checkpoint is no origin."""
    body = """
for name, file in (("one", "epoch=1-step=8.ckpt"), ("two", "epoch=0-step=4.ckpt")):
    this = run(name)
    checkpoint = sdk.Artifact(f"model-{name}", type="model", metadata={"original_filename": file})
    checkpoint.add_file(sys.argv[1] + "/report.json")
    this.log_artifact(checkpoint, aliases=["latest", "best"]).wait()
    publish(reports[-1], source=f"model-{name}"); sdk.finish()
"""
    with FakeWandb() as server:
        assert client(server, body) == ""
    assert (server.errors, server.unknown, server.uses) == ([], [], ["model-one"])
    made = {each.name: json.loads(each.metadata)["source_artifact"] for each in server.models if "-good" in each.name}
    assert made == {"model-one-good": "me/digits/model-one:v0", "model-two-good": "model-two"}


@pytest.mark.parametrize(
    ("fault", "options", "told"),
    [
        ({"fail": {"CreateArtifact": 500}}, "timeout=60", "epoch=1-step=8/good: "),
        ({"put_status": 403}, "timeout=60", "epoch=1-step=8/good: "),
        ({"fail": {"LinkArtifact": 403}}, "timeout=60, registry='model'", "epoch=1-step=8/good: CommError"),
        ({"seconds": 1.5}, "timeout=2", "epoch=1-step=8/good: not finished after 2 s"),
    ],
    ids=["500", "403 for files", "403 for links", "slow"],
)
def test_a_failed_upload_is_reported_in_one_line_and_the_run_succeeds(client, fault, options, told):
    with FakeWandb(**fault) as server:
        printed = client(server, f"run(); publish(reports[-1], {options}); sdk.finish(); print('ended')")
    line, end = printed.splitlines()
    assert line.startswith("told: ")
    assert told in line
    assert end == "ended"


def test_a_server_that_is_gone_is_reported(client):
    body = "run(); print('ready', flush=True); input(); publish(reports[-1], timeout=5); print('ended', flush=True)"
    with (client.folder / "stderr").open("w") as errors:
        with FakeWandb() as server:
            process = subprocess.Popen(
                client.command(body),
                cwd=client.folder,
                env=client.environment(server),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout.readline() == "ready\n"
        printed, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert re.match(r"told: .*epoch=1-step=8/good: .*\nended\n", printed)


WITHOUT_A_STEP = """
from dataclasses import replace
def without(outcome):
    about = {"outside": ("preprocess",), "remark": "one row per call"} if outcome.format == "static" else {}
    return replace(outcome, **about)
run()
publish(replace(reports[-1], outcomes=tuple(map(without, reports[-1].outcomes))), registry="model")
sdk.finish()
"""


def test_an_offline_run_is_linked_after_its_sync(tmp_path, finished, monkeypatch):
    export = shutil.copytree(finished, tmp_path / "exports" / finished.name)
    client = Client(tmp_path, export)
    with FakeWandb() as server:
        for name, value in client.environment(server).items():
            monkeypatch.setenv(name, value)
        assert client(server, WITHOUT_A_STEP, WANDB_MODE="offline") == ""
        assert server.calls == []
        (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        models = [each for each in wandb_log.read(log).artifacts if each.type == "model"]
        assert ["fastest" in each.aliases for each in models] == [True, False]
        assert [each.metadata["outside"] for each in models] == [[], ["preprocess"]]
        assert [each.metadata["remark"] for each in models] == ["", "one row per call"]
        assert models[1].files == {"model.json": len((finished / "static" / "model.json").read_bytes())}
        assert client.at_home() == []
        with pytest.raises(BadRequest, match=r"W&B has no me/digits/model-one-good:best.*wandb sync"):
            link(export)

        shutil.rmtree(export / "good")  # as when it is pruned: the run has links of its own
        sync = [str(Path(sys.executable).parent / "wandb"), "sync", "--yes", str(log.parent)]
        subprocess.run(sync, check=True, capture_output=True, timeout=60)
        (good,) = [each for each in server.models if each.name == "model-one-good"]
        assert good.files == {"model.json": (finished / "good" / "model.json").read_bytes()}
        assert server.links == []

        done = CliRunner().invoke(app, ["wandb-link", str(tmp_path)])
        assert done.output == "wandb-registry-model/digits-good:best <- me/digits/model-one-good:best\n"
        (linked,) = server.links
        assert (linked.source, linked.aliases) == ("model-one-good", ["best"])
    again = CliRunner().invoke(app, ["wandb-link", str(tmp_path)])
    assert (again.exit_code, "has no stored registry links" in again.output) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upload": "best"}, "upload='best'; known: True, False, 'all'"),
        ({"aliases": ["a/b"]}, "alias 'a/b'"),
        ({"aliases": ["v2"]}, "alias 'v2'"),
        ({"tags": ["onnx:fp16"]}, "tag 'onnx:fp16'"),
        ({"registry": "org/model/digits"}, "give '<registry>' or '<registry>/<collection>'"),
        ({"ttl_days": -1}, "greater than zero"),
    ],
)
def test_an_option_that_wandb_would_refuse_is_refused_at_construction(options, message):
    with pytest.raises(BadRequest, match=re.escape(message)):
        Wandb(**options)


def test_a_proof_that_came_later_is_published_into_the_run_that_is_over(tmp_path):
    """Until then, what a stand-in for the runtime verified is shown as such: in tables, tags and metadata."""
    proven = """
import json
from dataclasses import replace
from polyexport.publish.wandb import publish_into
def report(**ran):
    (reports[-1].folder / "static" / "polyexport.json").write_text(json.dumps(ran))  # as `accept` does
    def verified(outcome):
        return replace(outcome, state="verified", parity=replace(outcome.parity, **ran))
    found = reports[-1].outcomes
    return replace(reports[-1], outcomes=tuple(verified(each) if each.format == "static" else each for each in found))
run(); publish(report(off_device=True))
sdk.finish()
later = report(verified_by="Core ML")
publish_into(later, "digits/one", "model/numbers")
try:
    publish_into(later, "digits/nobody")
except Exception as error:
    print(type(error).__name__, str(error)[:39])
"""
    client = Client(tmp_path, written.run(tmp_path / "run")[-1].folder)
    with FakeWandb() as server:
        printed = client(server, proven)
    assert (printed.strip(), server.unknown) == ("BadRequest W&B cannot open the run digits/nobody:", [])
    assert {link.source for link in server.links} == {"model-one-good", "model-one-static"}
    assert {each.name for each in server.models} == {"model-one-good", "model-one-static"}
    static = [each for each in server.models if each.name == "model-one-static"]
    assert [each.tags[2] for each in static] == ["verified-off-device", "verified"]
    assert [json.loads(each.metadata)["state"] for each in static] == ["verified off-device", "verified"]


@pytest.mark.parametrize("run", ["one", "/one", "digits/", "a/b/c/d", ""])
def test_a_run_named_in_another_way_is_refused(run):
    with pytest.raises(BadRequest, match=r"is not a W&B run; write PROJECT/RUN or ENTITY/PROJECT/RUN"):
        publish_into(Report(Checkpoint(""), None, ()), run)
