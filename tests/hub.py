"""A small model hub on this machine that huggingface_hub's own client talks to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: The commit of every repository.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as models, and yields the address and the list of the files that were downloaded."""
    served: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            for name, folder in models.items():
                if re.fullmatch(rf"/api/models/{name}(/revision/[\w.]+)?", path):
                    self._send(200, json.dumps(_info(name, folder)).encode(), body, "application/json")
                    return
                if re.fullmatch(rf"/api/models/{name}/tree/[\w.]+", path):
                    self._send(200, json.dumps(_tree(folder)).encode(), body, "application/json")
                    return
                file = re.fullmatch(rf"/{name}/resolve/[\w.]+/([\w.-]+)", path)
                if file and (folder / file[1]).is_file():
                    if body:
                        served.append(file[1])
                    self._send(200, (folder / file[1]).read_bytes(), body, "application/octet-stream")
                    return
            self._send(404, b"{}", body, "application/json")

        def _send(self, status: int, data: bytes, body: bool, kind: str) -> None:
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            self.send_response(206 if start else status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()


def _info(name: str, folder: Path) -> dict[str, object]:
    files = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
    return {"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "siblings": files, "private": False, "tags": []}


def _tree(folder: Path) -> list[dict[str, object]]:
    files = sorted(folder.iterdir())
    return [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files]
