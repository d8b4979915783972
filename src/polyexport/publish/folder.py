"""Copies the finished export to any fsspec URL (`s3://`, `gs://`, `memory://` …)."""

from __future__ import annotations

import posixpath
from pathlib import Path

from polyexport.publish import Sink
from polyexport.report.manifest import MANIFEST, load
from polyexport.report.report import Report

_MADE_HERE = ("source/made", "source/jobs")  # only for reproducing a step on the machine that made it


def copy_to(url: str, *, source: bool = False) -> Sink:
    """A sink that copies the export to `<url>/<its name>`, and its name into the file `<url>/best`, last.

    `source/` is not copied unless `source` is True: it has the module with its hyperparameters and globals, which may
    contain secrets such as tokens. Only the batches in it that artifacts are verified with are copied.
    """
    left_here = _MADE_HERE if source else ("source/",)

    def publish(report: Report) -> None:
        import fsspec

        filesystem, root = fsspec.url_to_fs(url)
        batches = _batches(report.folder)
        target = posixpath.join(root, report.folder.name)
        for file in sorted(path for path in report.folder.rglob("*") if path.is_file()):
            name = file.relative_to(report.folder).as_posix()
            if name in batches or not name.startswith(left_here):
                filesystem.makedirs(posixpath.dirname(posixpath.join(target, name)), exist_ok=True)
                filesystem.put_file(str(file), posixpath.join(target, name))
        filesystem.pipe_file(posixpath.join(root, "best"), report.folder.name.encode())

    return publish


def _batches(folder: Path) -> set[str]:
    """The batches and noise floors of the manifest; none without a manifest, if the module could not be rebuilt."""
    return load(folder).data if (folder / MANIFEST).exists() else set()
