"""A server on loopback that answers as the Hugging Face Hub does to whoever uploads, and keeps what it gets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from json_http import JsonAnswers


@dataclass
class Hub:
    """A hub with one repository.

    Attributes:
        address: Its URL.
        files: The files of the repository by path.
        asked: The paths of the POST requests that it got.
        created: The request that created the repository.
        refuses: The HTTP status with which it refuses every POST; 0 to accept them.
        stored: Uploaded large files by SHA-256, of which a commit makes files of the repository.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    refuses: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub, until the end of the block."""
    with _Server(("127.0.0.1", 0), _Answers) as server:
        server.hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.hub
        server.shutdown()


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.hub = Hub()


class _Answers(JsonAnswers):
    server: _Server

    def do_GET(self) -> None:
        if "/tree/" not in self.path:  # the client asks for other things too, and does without
            return self.answer({"error": "there is none"}, 404)
        sizes = {name: len(data) for name, data in self.server.hub.files.items()}
        self.answer([{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()])

    def do_PUT(self) -> None:
        body = self._body()
        self.server.hub.stored[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server.hub, self._body()
        hub.asked.append(self.path)
        if hub.refuses:
            self.answer({"error": "you may not write here"}, hub.refuses)
        elif self.path.endswith("/api/repos/create"):
            hub.created = json.loads(body)
            self.answer({"url": f"{hub.address}/user/model"})
        elif self.path.endswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.answer({"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/objects/batch"):
            objects = [_upload_address(hub, each) for each in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            _commit(hub, [json.loads(line) for line in body.splitlines()])
            self.answer({"commitOid": "abc", "commitUrl": f"{hub.address}/user/model/commit/abc"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


def _upload_mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "regular" if path.endswith((".md", ".json")) else "lfs", "shouldIgnore": False}


def _upload_address(hub: Hub, blob: dict[str, Any]) -> dict[str, Any]:
    return {
        "oid": blob["oid"],
        "size": blob["size"],
        "actions": {"upload": {"href": f"{hub.address}/lfs/{blob['oid']}"}},
    }


def _commit(hub: Hub, operations: list[dict[str, Any]]) -> None:
    for operation in operations:
        value = operation["value"]
        match operation["key"]:
            case "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                hub.files[value["path"]] = hub.stored[value["oid"]]
            case "deletedFile":
                del hub.files[value["path"]]
