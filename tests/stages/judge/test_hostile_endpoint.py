"""An endpoint may answer anything: it gets no key by a redirect, stalls nothing, and nothing malformed is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stages.base import Context, UserError
from stages.judge import endpoint, http_client
from stages.judge.stage import run
from tests.stages.judge.conftest import MT_BENCH
from tests.stages.judge.server import KEY, Answer, serving
from tests.stages.judge.test_mt_bench import fair, place, values

Step = Callable[..., Context]
require_model = endpoint.require_model.__wrapped__  # asks at every call
BODIES: dict[str, bytes] = {
    "no message": b'{"choices": [{"message": null}]}',
    "no choice": b'{"choices": []}',
    "choices of another type": b'{"choices": 5}',
    "content of another type": b'{"choices": [{"message": {"content": {"a": 1}}}]}',
    "content in parts": b'{"choices": [{"message": {"content": [["Rating: [[5]]"]]}}]}',
    "a finish reason of another type": b'{"choices": [{"finish_reason": {}, "message": {"content": "Rating: [[5]]"}}]}',
    "a model of another type": b'{"model": [1], "choices": [{"message": {"content": "Rating: [[5]]"}}]}',
    "a list": b"[]",
    "a number": b"1e999",
    "nothing": b"",
    "too deep": b"[" * 200_000,
    "deep in a reply": b'{"choices": [{"message": {"content": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}]}",
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "half a pair": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
}


def raw(body: bytes, **headers: str) -> Answer:
    return lambda handler: handler.send(200, body, **headers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_reply_is_asked_again_and_counted(step: Step, name: str) -> None:
    """Both times for one judgement, once for another; a healthy judge is asked for it after a resume."""
    tries: dict[tuple[int, int], int] = {}

    def reply(request: dict[str, Any]) -> Answer:
        key = place(request)
        tries[key] = tries.get(key, 0) + 1
        return raw(BODIES[name]) if key == (141, 2) or (key == (81, 1) and tries[key] == 1) else fair(request)

    with serving(reply) as server:
        context = step(server.url, mt_bench=MT_BENCH, options={"retries": 0})
        metrics = run(context)
    assert tries[81, 1] == tries[141, 2] == 2
    assert metrics.notes[0].startswith("mt_bench: 1 of 10 judgements could not be read after 2 attempts")
    assert values(metrics)["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 2 + 5) / 9)
    assert all(json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open())


def test_a_redirect_does_not_carry_the_key(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the list of models nor of a judgement."""
    with serving(fair) as other, serving(lambda _: redirect(other.url)) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        with pytest.raises(UserError, match=r"judge: http://127.*:\d+ redirects to http://127.*; if you trust that"):
            run(context)
        monkeypatch.setattr(server.RequestHandlerClass, "do_GET", redirects(other.url))
        with pytest.raises(UserError, match=r"redirects to http://127.*OPENAI_BASE_URL to it"):
            require_model("gpt-judge")
        assert other.requests == []


def redirect(url: str) -> Answer:
    return lambda handler: handler.send(307, b"", Location=f"{url}/chat/completions")  # type: ignore[attr-defined]


def redirects(url: str) -> Callable[[Any], None]:
    return lambda handler: handler.send(302, b"", Location=f"{url}/models")


def drip(handler: Any) -> None:
    """Send a byte of a reply every 50 milliseconds, for a minute."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1200")
    handler.end_headers()
    try:
        for _ in range(1200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


def drip_of_headers(handler: Any) -> None:
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(1200):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


@pytest.mark.parametrize("stall", [drip, drip_of_headers])
def test_a_reply_has_one_deadline(step: Step, stall: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LIST_TIMEOUT", 1.0)
    with serving(lambda _: stall) as server:
        start = time.monotonic()
        context = step(server.url, mt_bench=MT_BENCH, options={"timeout": 1.0, "retries": 1, "concurrency": 16})
        with pytest.raises(UserError, match=r"http://127.*:\d+ does not answer: .*; run the command again to resume"):
            run(context)
        monkeypatch.setattr(server.RequestHandlerClass, "do_GET", stall)
        with pytest.raises(UserError, match=r"\(OPENAI_BASE_URL\) cannot be reached: no response within 1 seconds"):
            require_model("gpt-judge")
        assert time.monotonic() - start < 25


def test_a_huge_reply_is_not_read_to_its_end(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a small one that unpacks to a huge one."""
    monkeypatch.setattr(http_client, "MOST_BYTES", 20_000)
    import gzip

    packed = gzip.compress(b" " * 10_000_000)

    def reply(request: dict[str, Any]) -> Answer:
        if place(request) == (81, 1):
            return raw(packed, Content_Encoding="gzip")
        return raw(b" " * 100_000) if place(request) == (141, 2) else fair(request)

    with serving(reply) as server:
        metrics = run(step(server.url, mt_bench=MT_BENCH))
    assert metrics.notes[0].startswith("mt_bench: 2 of 10 judgements could not be read")


def test_a_path_with_a_key_is_not_shown(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _: 400) as server:
        context = step(server.url.replace("/v1", "/k3y-in-the-path/v1"), mt_bench=MT_BENCH)
        with pytest.raises(UserError, match="answers 400") as error:
            run(context)
    assert "k3y-in-the-path" not in str(error.value)


def test_an_echoed_key_is_masked(step: Step) -> None:
    """As the model's name, or within a reply that is kept."""

    def reply(request: dict[str, Any]) -> Answer:
        message = {"role": "assistant", "content": f"{KEY}\n{fair(request)}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return raw(json.dumps({"model": f"m-{KEY}", "choices": [choice]}).encode())

    with serving(reply) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        run(context)
    for file in (*context.out.iterdir(), *context.checkpoints.iterdir()):
        assert KEY.encode() not in file.read_bytes()
    assert "m-***" in (context.out / "samples_mt_bench.jsonl").read_text()


def test_a_changed_answer_and_a_broken_line_are_asked_again(step: Step) -> None:
    """The log of answers has a checksum on every line."""
    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        expected = run(context)
        log = context.checkpoints / "answers.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        judged = [i for i, line in enumerate(lines) if b"mt_bench 111 1" in line]
        lines[judged[0]] = lines[judged[0]].replace(b"[[3]]", b"[[9]]")
        lines[0] = lines[0][:9] + b"\n"
        log.write_bytes(b"".join(lines) + b"\xff\xfe not JSON\n[]\n" + lines[-1][:20])
        server.requests.clear()
        again = run(replace(context, scratch=context.scratch / "again"))
    assert again.results == expected.results
    assert [place(request) for request in server.requests] == [(111, 1)]
