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


@dataclass
class Hub:
    """Its address; the files of its one repository by name; the requests that it got; and what it refuses with."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    created: dict[str, Any] = field(default_factory=dict)
    refuses: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub, until the end of the block."""
    hub = Hub()

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if "/tree/" not in self.path:  # the client asks for other things too, and does without
                return self._answer({"error": "there is none"}, 404)
            sizes = {name: len(data) for name, data in hub.files.items()}
            self._answer([{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()])

        def do_PUT(self) -> None:
            body = self._body()
            hub.stored[hashlib.sha256(body).hexdigest()] = body
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            hub.asked.append(self.path)
            if hub.refuses:
                self._answer({"error": "you may not write here"}, hub.refuses)
            elif self.path.endswith("/api/repos/create"):
                hub.created = json.loads(body)
                self._answer({"url": f"{hub.address}/user/model"})
            elif self.path.endswith("/api/validate-yaml"):
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                self._answer({"files": [_mode(each["path"]) for each in json.loads(body)["files"]]})
            elif self.path.endswith("/objects/batch"):
                self._answer(
                    {"transfer": "basic", "objects": [_place(hub, each) for each in json.loads(body)["objects"]]}
                )
            else:
                _commit(hub, [json.loads(line) for line in body.splitlines()])
                self._answer({"commitOid": "abc", "commitUrl": f"{hub.address}/user/model/commit/abc"})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def _answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "regular" if path.endswith((".md", ".json")) else "lfs", "shouldIgnore": False}


def _place(hub: Hub, each: dict[str, Any]) -> dict[str, Any]:
    return {
        "oid": each["oid"],
        "size": each["size"],
        "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}},
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
