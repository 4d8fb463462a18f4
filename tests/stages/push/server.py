"""A local hub that accepts uploads from huggingface_hub: repositories, commits as NDJSON, large files by LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of-the-test"


@dataclass
class Repo:
    """A repository with its branch main."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """A hub with the user `me`, a member of the organisation `lab`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.requests: list[str] = []
        self.role = "write"
        self.refuses: dict[str, int] = {}
        """Prefix of a path -> the status of its answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self) -> None:
        path, hub = urlsplit(self.path).path, self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT":  # LFS stores receive no token
            hub.large[path.rpartition("/")[2]] = body
            return self.send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        for prefix, status in hub.refuses.items():
            if path.startswith(prefix):
                return self.send(status, {"error": "scripted"})
        return self.answer(path, body)

    def answer(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/whoami-v2":
            return self.send(
                200,
                {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": hub.role}}},
            )
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            repo_options = json.loads(body)
            name = f"{repo_options['organization']}/{repo_options['name']}"
            if name in hub.repos:
                return self.send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repos[name] = Repo(repo_options.get("visibility") == "private")
            return self.send(200, {"url": f"{hub.url}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        parts = path.removeprefix("/api/models/").split("/")
        repo = hub.repos["/".join(parts[:2])]
        if parts[2:3] == ["preupload"]:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(repo.files.get(file["path"]), file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": files})
        if parts[2:3] == ["commit"]:
            return self.commit("/".join(parts[:2]), repo, body)
        siblings = [{"rfilename": name} for name in repo.files]
        sha = repo.commits[-1] if repo.commits else "0" * 40
        return self.send(200, {"id": "/".join(parts[:2]), "private": repo.private, "sha": sha, "siblings": siblings})

    def commit(self, name: str, repo: Repo, body: bytes) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.server.url}/{name}/commit/{repo.commits[-1]}"
        self.send(200, {"success": True, "commitOid": repo.commits[-1], "commitUrl": url})

    do_GET = do_POST = do_PUT = handle_one


def _oid(content: bytes | None, path: str) -> str | None:
    """The hub's id of a file: SHA-256 of a large file, else git's blob id."""
    if content is None:
        return None
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
