"""Any place that fsspec knows (`s3://`, `gs://`, `memory://` …): a copy of the finished export."""

from __future__ import annotations

import posixpath

from polyexport.publish import Sink
from polyexport.report.report import Report

_LEFT_HERE = ("source/made", "source/jobs")  # they serve to reproduce a step on the machine that made it


def copy_to(url: str) -> Sink:
    """A sink that copies the export to `<url>/<its name>`, and its name into the file `<url>/best`, last."""

    def publish(report: Report) -> None:
        import fsspec

        filesystem, root = fsspec.url_to_fs(url)
        target = posixpath.join(root, report.folder.name)
        for file in sorted(path for path in report.folder.rglob("*") if path.is_file()):
            name = file.relative_to(report.folder).as_posix()
            if not name.startswith(_LEFT_HERE):
                filesystem.makedirs(posixpath.dirname(posixpath.join(target, name)), exist_ok=True)
                filesystem.put_file(str(file), posixpath.join(target, name))
        filesystem.pipe_file(posixpath.join(root, "best"), report.folder.name.encode())

    return publish
