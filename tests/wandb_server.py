"""A mock W&B backend on localhost for the real client; it records what arrives and when."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Backend:
    """Received data.

    Args:
        delay: Delay of every response in seconds.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.rows: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.config: dict[str, Any] = {}
        self.other: list[str] = []
        self.changed = threading.Condition()
        self.url = ""

    def wait(self, there: Any, seconds: float = 30) -> bool:
        """Returns whether a condition becomes true within some time."""
        with self.changed:
            return bool(self.changed.wait_for(there, seconds))

    def history(self, key: str) -> list[tuple[int, Any]]:
        """(global step, value) of each row that has the key."""
        return [(row["trainer/global_step"], row[key]) for row in self.rows if key in row]

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        query, given = body.get("query", ""), body.get("variables") or {}
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", ""])[1]
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        if name == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        if name == "UpsertBucket":
            self.config |= json.loads(given.get("config") or "{}")
            bucket = {"id": "b", "name": given.get("name"), "displayName": "run", "description": "", "config": "{}",
                      "sweepName": None, "project": project, "historyLineCount": 0}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        self.other.append(name)
        return {}

    def stream(self, body: dict[str, Any]) -> None:
        history = body.get("files", {}).get("wandb-history.jsonl", {})
        self.rows += [json.loads(line) for line in history.get("content", ())]


@contextmanager
def backend(delay: float = 0.0) -> Iterator[Backend]:
    """Runs a backend until the block ends."""
    kept = Backend(delay)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(kept.delay)
            answer: dict[str, Any] = {}
            with kept.changed:
                if self.path == "/graphql":
                    answer = {"data": kept.graphql(json.loads(body))}
                elif self.path.endswith("/file_stream"):
                    kept.stream(json.loads(body))
                else:
                    kept.other.append(self.path)
                kept.changed.notify_all()
            self.answer(answer)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(kept.delay)
            with kept.changed:
                kept.files[self.path.removeprefix("/upload/")] = body
                kept.changed.notify_all()
            self.answer({})

        def do_GET(self) -> None:
            kept.other.append(self.path)
            self.answer({})

        def answer(self, fields: dict[str, Any]) -> None:
            text = json.dumps(fields).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Ignores clients that disconnect."""

    server = Server(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
