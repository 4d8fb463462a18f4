"""An OpenAI-compatible server on the loopback interface with scripted replies and failures."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-of-the-test"
Answer = str | dict[str, Any] | int | Callable[[BaseHTTPRequestHandler], None]
"""Text, a complete choice, an error status, or a function of the connection's handler."""


class Server(ThreadingHTTPServer):
    """Answers every chat completion with `reply(request)`."""

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any]], Answer], models: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        """Every request in order of arrival."""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        self.send(401, b'{"error": {"message": "wrong key"}}')
        return False

    def do_GET(self) -> None:
        if self.allowed():
            self.send(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        with self.server.lock:
            self.server.requests.append(request)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            answer = self.server.reply(request)
            if isinstance(answer, int):
                self.send(answer, b'{"error": {"message": "scripted"}}', Retry_After="0.05")
            elif callable(answer):
                answer(self)
            else:
                choice = answer if isinstance(answer, dict) else {}
                content = answer if isinstance(answer, str) else ""
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": content},
                } | choice
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
                self.send(200, json.dumps(body | {"choices": [choice], "usage": usage}).encode())
        finally:
            with self.server.lock:
                self.server.at_once -= 1


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Answer], models: tuple[str, ...] = ("gpt-judge",)) -> Iterator[Server]:
    """Run a server in the block."""
    server = Server(reply, models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection in the middle of a reply."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x", "choi')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def garbage(handler: Any) -> None:
    """Reply with a body that is not JSON despite its content type."""
    handler.send(200, b"<html>gateway</html>")


def slow(handler: Any) -> None:
    """Reply after the test's time-out."""
    time.sleep(1.5)
    handler.send(200, b"{}")
