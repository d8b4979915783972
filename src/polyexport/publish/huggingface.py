"""A model repository on the Hugging Face Hub: the artifacts that agree with PyTorch, and a model card.

https://huggingface.co/docs/huggingface_hub/guides/upload

Requirements:
* One commit has all of it, so that a repository never holds half an export; it also removes artifacts of formats that
  are not in this export.
* Neither validation data nor paths of this machine are uploaded: neither `source/` nor the report itself.
* The Hub may be slow, refuse or be down: publishing takes at most `timeout` seconds, and errors are reported.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest, line
from polyexport.formats import known
from polyexport.publish.bom import BOM
from polyexport.publish.signed import SIGNATURE
from polyexport.report.card import card
from polyexport.report.report import Report


class HuggingFace:
    """A sink into a repository of the Hugging Face Hub, or of a compatible server (`HF_ENDPOINT`).

    Authentication is `huggingface_hub`'s: `hf auth login`, or the variable `HF_TOKEN`.

    Not a dataclass, since Hydra takes those for a part of the configuration.

    Args:
        repository: `"user/model"`; created if it does not exist.
        private: Whether a repository that is created is private.
        use: Intended and out-of-scope uses, in Markdown, for the model card.
        license_id: The model's license, by the Hub's identifier: `"apache-2.0"`.
        revision: The branch.
        timeout: Seconds that publishing may take.

    Raises:
        BadRequest: `repository` is not of the form `"user/model"`, or `huggingface_hub` is not installed.
    """

    def __init__(
        self,
        repository: str,
        *,
        private: bool = True,
        use: str = "",
        license_id: str = "",
        revision: str = "main",
        timeout: float = 600.0,
    ) -> None:
        if not isinstance(repository, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise BadRequest(f"repository={repository!r}; give 'user/model'")
        if timeout <= 0:
            raise BadRequest(f"timeout={timeout:g}; give the seconds that publishing may take")
        if find_spec("huggingface_hub") is None:
            raise BadRequest(
                "HuggingFace requires huggingface_hub; install with `pip install lightning-export[huggingface]` or "
                "`pip install huggingface_hub`"
            )
        self.repository = repository
        self.private = private
        self.use = use
        self.license_id = license_id
        self.revision = revision
        self.timeout = timeout

    def __call__(self, report: Report) -> None:
        """Publish the artifacts of a report.

        Raises:
            BadRequest: none of them agrees with PyTorch.
            ConnectionError: the upload did not finish in time, or the Hub refused it.
        """
        if not report.publishable:
            raise BadRequest("no artifact agrees with PyTorch")
        left = [f"not finished after {self.timeout:g} s"]
        # some calls of the client have no timeout; a daemon thread ends with the process
        work = threading.Thread(target=self._publish, args=(report, left), name="polyexport-huggingface", daemon=True)
        work.start()
        work.join(self.timeout)
        if left:
            raise ConnectionError(f"{self.repository}: {left[0]}")

    def _publish(self, report: Report, left: list[str]) -> None:
        """Upload everything; `left` has the reason why it is not finished, and is empty once it is."""
        try:
            self._commit(report)
        except Exception as error:  # the network may fail in any way, and so may the client
            left[:] = [line(error, 300)]
        else:
            left.clear()

    def _commit(self, report: Report) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        hub: Any = HfApi()
        hub.create_repo(self.repository, private=self.private, exist_ok=True)
        files = {file.relative_to(report.folder).as_posix(): file for file in published(report)}
        text = card(report, self.repository, use=self.use, license_id=self.license_id)
        there = hub.list_repo_files(self.repository, revision=self.revision)
        old = [name for name in there if name.partition("/")[0] in known() and name not in files]
        hub.create_commit(
            self.repository,
            [
                CommitOperationAdd("README.md", text.encode()),
                *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
                *map(CommitOperationDelete, old),
            ],
            commit_message=f"Export of {report.folder.name}",
            revision=self.revision,
        )


def published(report: Report) -> Iterator[Path]:
    """The files of the artifacts that agree with PyTorch, the signature and the bill of materials."""
    for outcome in report.publishable:
        yield from sorted(path for path in (report.folder / outcome.format).rglob("*") if path.is_file())
    yield from (path for path in (report.folder / BOM, report.folder / SIGNATURE) if path.is_file())
