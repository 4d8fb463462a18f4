"""A local model hub with the API that huggingface_hub and datasets need to download repositories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
"""The commit of every repository."""


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve repositories, `models/org/name` or `datasets/org/name` -> folder, and yield the hub's address."""

    class Handler(_Handler):
        folders = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folders: dict[str, Path]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        name, rest = self._repository(unquote(self.path))
        if name is None or not rest.startswith("paths-info/"):
            return self._refuse()
        entries = self._entries(name)
        return self._answer(json.dumps([entry for entry in entries if entry["path"] in paths]).encode())

    def do_GET(self) -> None:
        path = unquote(self.path).partition("?")[0]
        name, rest = self._repository(path)
        if name is None:
            return self._refuse()
        if match := re.fullmatch(r"resolve/[^/]+/(.+)", rest):
            file = self.folders[name] / match[1]
            return (
                self._answer(file.read_bytes(), entity_tag(file)) if file.is_file() else self._refuse("EntryNotFound")
            )
        if re.fullmatch(r"(revision/[^/]+)?", rest):
            files = [{"rfilename": entry["path"]} for entry in self._entries(name)]
            info = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": files, "private": False, "tags": []}
            return self._answer(json.dumps(info).encode())
        if re.fullmatch(r"tree/[^/]+", rest):
            return self._answer(json.dumps(self._entries(name)).encode())
        return self._refuse("EntryNotFound")

    def _repository(self, path: str) -> tuple[str | None, str]:
        """Split a path into the repository and the rest."""
        for name in self.folders:
            kind, _, repository = name.partition("/")
            for prefix in (f"/api/{kind}/{repository}", f"/{kind}/{repository}", f"/{repository}"):
                if path == prefix or path.startswith(f"{prefix}/"):
                    return name, path[len(prefix) + 1 :]
        return None, ""

    def _entries(self, name: str) -> list[dict[str, object]]:
        files = sorted(file for file in self.folders[name].rglob("*") if file.is_file())
        return [
            {
                "type": "file",
                "path": file.relative_to(self.folders[name]).as_posix(),
                "size": file.stat().st_size,
                "oid": entity_tag(file),
            }
            for file in files
        ]

    def _answer(self, body: bytes, tag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str = "RepoNotFound") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def entity_tag(file: Path) -> str:
    """The hash by which the hub names a file: SHA-256 of weights, as Git LFS keeps them, git's own of others."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
