"""MT-Bench over HTTP, with scores computed by hand."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.base import Context, UserError
from stages.judge.mt_bench import parse_grade
from stages.judge.stage import run
from stages.records.metrics import Metrics
from tests.pipeline.run.test_command import command
from tests.pipeline.run.test_faults import start, wait_until
from tests.stages.judge.conftest import MT_BENCH, QUESTIONS, write_files
from tests.stages.judge.server import KEY, Answer, cut, garbage, serving, slow

Step = Callable[..., Context]
GRADES = {(81, 1): 7, (81, 2): 4.5, (101, 1): 10, (101, 2): 1, (111, 1): 3, (111, 2): 8}
GRADES |= {(141, 1): 6, (141, 2): 9, (142, 1): 2, (142, 2): 5}


def place(request: dict[str, Any]) -> tuple[int, int]:
    """The question and the turn of a request to the judge."""
    prompt = request["messages"][1]["content"]
    for question in QUESTIONS:
        first, second = question["turns"]
        if f"Q {first}\n" in prompt:
            return question["question_id"], 2 if f"Q {second}\n" in prompt else 1
    raise AssertionError(prompt)


def fair(request: dict[str, Any]) -> str:
    return f"It is short, but not wrong.\nRating: [[{GRADES[place(request)]:g}]]"


def values(metrics: Metrics) -> dict[tuple[str, str], float | None]:
    return {(row.task, row.metric): row.value for row in metrics.results or []}


def test_the_score_is_the_mean_of_all_grades(step: Step) -> None:
    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        metrics = run(context)
    scores = values(metrics)
    assert scores["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 9 + 2 + 5) / 10)
    assert scores["mt_bench", "score_over_10"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 9 + 2 + 5) / 100)
    assert scores["mt_bench_turn_1", "score"] == pytest.approx((7 + 10 + 3 + 6 + 2) / 5)
    assert scores["mt_bench_turn_2", "score"] == pytest.approx((4.5 + 1 + 8 + 9 + 5) / 5)
    categories = {"writing": 5.75, "reasoning": 5.5, "math": 5.5, "stem": 5.5}
    assert {name: scores[f"mt_bench_{name}", "score"] for name in categories} == categories
    assert metrics.results is not None
    head = metrics.results[0]
    means = [5.75, 5.5, 5.5, 7.5, 3.5]
    assert head.headline
    assert head.n == 5
    assert head.stderr == pytest.approx(statistics.stdev(means) / 5**0.5 / 10)
    assert [row.task for row in metrics.results if row.headline] == ["mt_bench"]
    assert metrics.notes == []
    assert len(server.requests) == 10
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    assert [sample["score"] for sample in samples] == means
    assert samples[0]["grades"] == [7, 4.5]


def test_the_judges_prompts(step: Step) -> None:
    """The second request has both turns, math has reference answers, and the judge is greedy."""
    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        run(context)
    requests = {place(request): request for request in server.requests}
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    answers = {q["question_id"]: sample["responses"] for q, sample in zip(QUESTIONS, samples, strict=True)}
    expected = {
        (81, 1): ("Be fair.", f'Rate "[[5]]".\nQ Write a line.\nA {answers[81][0]}'),
        (81, 2): (
            "Be fair on the second.",
            f"Q Write a line.\nA {answers[81][0]}\nQ Now {{shorter}}.\nA {answers[81][1]}",
        ),
        (111, 1): ("Be exact.", f"Q 1 + 1?\nR 2\nA {answers[111][0]}"),
        (111, 2): (
            "Be exact on the second.",
            f"Q 1 + 1?\nR 2\nA {answers[111][0]}\nQ Twice that?\nR 4\nA {answers[111][1]}",
        ),
    }
    for key, (system, prompt) in expected.items():
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        assert requests[key]["messages"] == messages
        assert requests[key]["temperature"] == 0
        assert requests[key]["model"] == "gpt-judge"


def test_greedy_answers_equal_generate(step: Step, model_folder: Any) -> None:
    """The second turn follows the first answer. Here the answers are generated one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)

    def answer(messages: list[dict[str, str]]) -> str:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        run(context)
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    for sample in samples:
        if sample["category"] in ("math", "reasoning"):
            first = answer([{"role": "user", "content": sample["prompts"][0]}])
            messages = [{"role": "user", "content": sample["prompts"][0]}, {"role": "assistant", "content": first}]
            second = answer([*messages, {"role": "user", "content": sample["prompts"][1]}])
            assert sample["responses"] == [first, second]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("As [1] and [2] say, it is true. Rating: [[4]]", 4.0),
        ("<think>First [[2]].</think>\nRating: [[9]]", 9.0),
        ("Rating:\n\n[[6]]", 6.0),
    ],
)
def test_a_grade(text: str, expected: float) -> None:
    """Those that the authors' code reads, too, are in test_fastchat.py."""
    assert parse_grade({"message": {"content": text}}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I will not grade this. A grade has the form [[5]].",
        'The answer must end with the form "Rating: [[5]]". The second',
        'I cannot say "Rating: [[5]]".',
        "First [[3]], at last [[8.5]].",
        "Rating: [[8]]/[[10]]",
        "Rating: [[0]]",
        "[[11]]",
        "Rating: 7",
        "[[seven]]",
        "",
        None,
    ],
)
def test_anything_else_is_no_grade(text: str | None) -> None:
    assert parse_grade({"message": {"content": text}}) is None


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "length"},
        {"finish_reason": "content_filter"},
        {"message": {"role": "assistant", "content": "Rating: [[5]]", "refusal": "I will not."}},
    ],
)
def test_a_cut_reply_and_a_refusal_are_asked_again_once(step: Step, choice: dict[str, Any]) -> None:
    """One of ten is unreadable at first, another one always; the mean is of the nine."""
    tries: Counter[tuple[int, int]] = Counter()

    def reply(request: dict[str, Any]) -> Answer:
        key = place(request)
        tries[key] += 1
        if key == (141, 2) or (key == (81, 1) and tries[key] == 1):
            return {"message": {"role": "assistant", "content": "Rating: [[5]]"}} | choice
        return fair(request)

    with serving(reply) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        metrics = run(context)
    assert (tries[81, 1], tries[141, 2], tries[101, 1]) == (2, 2, 1)
    assert values(metrics)["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 2 + 5) / 9)
    assert metrics.notes == [
        "mt_bench: 1 of 10 judgements could not be read after 2 attempts; the scores are of the other 9"
    ]


def test_each_judgement_says_who_answered(step: Step) -> None:
    """A step that is resumed when another model answers under the judge's name says so."""
    version, refused = "gpt-judge-1", True

    def reply(request: dict[str, Any]) -> Answer:
        if refused and place(request)[0] in (141, 142):
            return 400
        return lambda handler: handler.send(200, json.dumps(completion(request)).encode())

    def completion(request: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": fair(request)}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = {"id": "x", "object": "chat.completion", "created": 0, "choices": choices}
        return body | {"model": version, "system_fingerprint": "fp"}

    with serving(reply) as server:
        context = step(server.url, mt_bench=MT_BENCH, options={"concurrency": 1})
        with pytest.raises(UserError, match="answers 400"):
            run(context)
        version, refused = "gpt-judge-2", False
        metrics = run(replace(context, scratch=context.scratch / "again"))
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    where = {"endpoint": server.url, "system_fingerprint": "fp"}
    assert [sample["judged_by"] for sample in samples[2:4]] == [
        [{"model": "gpt-judge-1"} | where] * 2,
        [{"model": "gpt-judge-2"} | where] * 2,
    ]
    assert metrics.notes == [
        "gpt-judge: judgements are not comparable, since the judge changed:"
        f" 6 by gpt-judge-1, fp, {server.url}; 4 by gpt-judge-2, fp, {server.url}"
    ]


def test_an_unreadable_judgement_is_requested_again_then_counted(step: Step) -> None:
    tries: Counter[tuple[int, int]] = Counter()

    def reply(request: dict[str, Any]) -> str:
        key = place(request)
        tries[key] += 1
        if key == (141, 2) or (key == (81, 1) and tries[key] < 3):
            return "I would rather not."
        return fair(request)

    with serving(reply) as server:
        metrics = run(step(server.url, mt_bench=MT_BENCH, options={"attempts": 3}))
    assert tries[81, 1] == tries[141, 2] == 3
    assert tries[101, 1] == 1
    scores = values(metrics)
    assert scores["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 2 + 5) / 9)
    assert scores["mt_bench_turn_2", "score"] == pytest.approx((4.5 + 1 + 8 + 5) / 4)
    assert metrics.notes == [
        "mt_bench: 1 of 10 judgements could not be read after 3 attempts; the scores are of the other 9"
    ]
    with serving(lambda _: "no") as server, pytest.raises(UserError, match="none of the 10 judgements of gpt-judge"):
        run(step(server.url, mt_bench=MT_BENCH))


@pytest.mark.parametrize("fault", [429, 500, 503, cut, garbage, slow])
def test_faults_do_not_affect_scores(step: Step, fault: Answer) -> None:
    """Each request fails once before it has its reply."""
    failed: set[tuple[int, int]] = set()

    def reply(request: dict[str, Any]) -> Answer:
        key = place(request)
        if key not in failed:
            failed.add(key)
            return fault
        return fair(request)

    with serving(reply) as server:
        metrics = run(step(server.url, mt_bench=MT_BENCH, options={"timeout": 0.7}))
    assert values(metrics)["mt_bench", "score"] == pytest.approx(5.55)
    assert len(server.requests) == 20


def test_concurrency_limits_the_requests_at_a_time(step: Step) -> None:
    def reply(request: dict[str, Any]) -> str:
        time.sleep(0.1)
        return fair(request)

    with serving(reply) as server:
        run(step(server.url, mt_bench=MT_BENCH, options={"concurrency": 3}))
    assert server.most_at_once == 3


def test_an_interrupted_step_pays_for_nothing_twice(step: Step) -> None:
    refused = True

    def reply(request: dict[str, Any]) -> Answer:
        return 400 if refused and place(request)[0] in (141, 142) else fair(request)

    with serving(reply) as server:
        context = step(server.url, mt_bench=MT_BENCH, options={"concurrency": 1})
        with pytest.raises(UserError, match=r"judge: http://127.* answers 400: .*scripted"):
            run(context)
        answered = [place(request) for request in server.requests if place(request)[0] < 141]
        refused = False
        server.requests.clear()
        again = run(replace(context, scratch=context.scratch / "again"))
    assert len(answered) == 6
    assert not {place(request) for request in server.requests} & {*answered}
    assert values(again)["mt_bench", "score"] == pytest.approx(5.55)
    assert re.search("mt_bench", (context.checkpoints / "answers.jsonl").read_text())


RECIPE = """\
name: small
model: ./model
stages:
  judged:
    kind: judge
    models: [base]
    judge: gpt-judge
    mt_bench: {questions: ./questions.jsonl, references: ./references.jsonl, prompts: ./prompts.jsonl}
    options: {max_new_tokens: 4, concurrency: 1}
"""


@pytest.mark.long
def test_a_killed_command_pays_for_nothing_twice(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only exception is the request that is open at that moment."""
    write_files(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def reply(request: dict[str, Any]) -> str:
        time.sleep(0.3)
        return fair(request)

    with serving(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        process = start(tmp_path)
        wait_until((len(server.requests) >= 5 for _ in itertools.count()), process)
        process.kill()
        process.communicate()
        before = len(server.requests)
        finished = command(tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert before < 10
    assert {place(request) for request in server.requests} == set(GRADES)
    assert len(server.requests) <= 11
    manifest = json.loads((tmp_path / "runs" / "small" / "judged[base]" / "stage.json").read_text())
    assert values(Metrics(**manifest["metrics"]))["mt_bench", "score"] == pytest.approx(5.55)
