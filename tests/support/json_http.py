"""What servers of the tests have in common that answer with JSON over HTTP."""

from __future__ import annotations

import http.server
import json
from typing import Any


class JsonAnswers(http.server.BaseHTTPRequestHandler):
    """Answers requests with JSON, and writes no log."""

    protocol_version = "HTTP/1.1"

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Write no log."""
