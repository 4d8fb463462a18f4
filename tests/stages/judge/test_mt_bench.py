"""MT-Bench through HTTP, its arithmetic by hand."""

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
from stages.judge.mt_bench import grade
from stages.judge.stage import run
from tests.pipeline.run.test_command import command
from tests.pipeline.run.test_faults import start, wait_until
from tests.stages.judge.conftest import MT_BENCH, QUESTIONS, write_files
from tests.stages.judge.server import KEY, Answer, cut, garbage, serving, slow

Step = Callable[..., Context]
GRADES = {(81, 1): 7, (81, 2): 4.5, (101, 1): 10, (101, 2): 1, (111, 1): 3, (111, 2): 8}
GRADES |= {(141, 1): 6, (141, 2): 9, (142, 1): 2, (142, 2): 5}


def place(request: dict[str, Any]) -> tuple[int, int]:
    """The question and the turn that a request to the judge is about."""
    said = request["messages"][1]["content"]
    for question in QUESTIONS:
        first, second = question["turns"]
        if f"Q {first}\n" in said:
            return question["question_id"], 2 if f"Q {second}\n" in said else 1
    raise AssertionError(said)


def fair(request: dict[str, Any]) -> str:
    return f"As [[1]] would be too little: [[{GRADES[place(request)]:g}]]"


def values(metrics: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in metrics["results"]}


def test_the_score_is_the_mean_of_all_grades(step: Step) -> None:
    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        metrics = run(context)
    found = values(metrics)
    assert found["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 9 + 2 + 5) / 10)
    assert found["mt_bench", "score_over_10"] == pytest.approx(found["mt_bench", "score"] / 10)
    assert found["mt_bench_turn_1", "score"] == pytest.approx((7 + 10 + 3 + 6 + 2) / 5)
    assert found["mt_bench_turn_2", "score"] == pytest.approx((4.5 + 1 + 8 + 9 + 5) / 5)
    categories = {"writing": 5.75, "reasoning": 5.5, "math": 5.5, "stem": 5.5}
    assert {name: found[f"mt_bench_{name}", "score"] for name in categories} == categories
    head = metrics["results"][0]
    means = [5.75, 5.5, 5.5, 7.5, 3.5]
    assert head["headline"]
    assert head["n"] == 5
    assert head["stderr"] == pytest.approx(statistics.stdev(means) / 5**0.5 / 10)
    assert [row["task"] for row in metrics["results"] if row["headline"]] == ["mt_bench"]
    assert metrics["notes"] == []
    assert len(server.asked) == 10
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    assert [sample["score"] for sample in samples] == means
    assert samples[0]["grades"] == [7, 4.5]


def test_what_the_judge_is_told(step: Step) -> None:
    """Right answers where the category has some, both turns for the second, greedy, and each answer as it was given."""
    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        run(context)
    asked = {place(request): request for request in server.asked}
    said = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    of = {question["question_id"]: sample["responses"] for question, sample in zip(QUESTIONS, said, strict=True)}
    expected = {
        (81, 1): ("Be fair.", f'Rate "[[5]]".\nQ Write a line.\nA {of[81][0]}'),
        (81, 2): ("Be fair on the second.", f"Q Write a line.\nA {of[81][0]}\nQ Now {{shorter}}.\nA {of[81][1]}"),
        (111, 1): ("Be exact.", f"Q 1 + 1?\nR 2\nA {of[111][0]}"),
        (111, 2): ("Be exact on the second.", f"Q 1 + 1?\nR 2\nA {of[111][0]}\nQ Twice that?\nR 4\nA {of[111][1]}"),
    }
    for key, (system, prompt) in expected.items():
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        assert asked[key]["messages"] == messages
        assert asked[key]["temperature"] == 0
        assert asked[key]["model"] == "gpt-judge"


def test_greedy_answers_are_the_models_own(step: Step, model_folder: Any) -> None:
    """Of both turns, the second with the first answer in view; computed here one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)

    def answer(messages: list[dict[str, str]]) -> str:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    with serving(fair) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        run(context)
    said = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    for sample in said:
        if sample["category"] in ("math", "reasoning"):
            first = answer([{"role": "user", "content": sample["prompts"][0]}])
            messages = [{"role": "user", "content": sample["prompts"][0]}, {"role": "assistant", "content": first}]
            second = answer([*messages, {"role": "user", "content": sample["prompts"][1]}])
            assert sample["responses"] == [first, second]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Rating: [[7]]", 7.0),
        ("First [[3]], at last [[8.5]].", 8.5),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Rating: 7", None),
        ("[7]", None),
        ("[[seven]]", None),
        ("", None),
        (None, None),
    ],
)
def test_a_grade_is_read_never_guessed(said: str | None, expected: float | None) -> None:
    assert grade({"message": {"content": said}}) == expected


def test_a_judgement_that_cannot_be_read_is_asked_for_again_then_counted(step: Step) -> None:
    tries: Counter[tuple[int, int]] = Counter()

    def says(request: dict[str, Any]) -> str:
        where = place(request)
        tries[where] += 1
        if where == (141, 2) or (where == (81, 1) and tries[where] < 3):
            return "I would rather not."
        return fair(request)

    with serving(says) as server:
        metrics = run(step(server.url, mt_bench=MT_BENCH, options={"attempts": 3}))
    assert tries[81, 1] == tries[141, 2] == 3
    assert tries[101, 1] == 1
    found = values(metrics)
    assert found["mt_bench", "score"] == pytest.approx((7 + 4.5 + 10 + 1 + 3 + 8 + 6 + 2 + 5) / 9)
    assert found["mt_bench_turn_2", "score"] == pytest.approx((4.5 + 1 + 8 + 5) / 4)
    assert metrics["notes"] == ["mt_bench: 1 of 10 judgements could not be read after 3 attempts; they count nowhere"]
    with serving(lambda _: "no") as server, pytest.raises(UserError, match="none of the 10 judgements of gpt-judge"):
        run(step(server.url, mt_bench=MT_BENCH))


@pytest.mark.parametrize("fault", [429, 500, 503, cut, garbage, slow])
def test_faults_change_no_score(step: Step, fault: Answer) -> None:
    """Each request meets the fault once before it is answered."""
    met: set[tuple[int, int]] = set()

    def says(request: dict[str, Any]) -> Answer:
        where = place(request)
        if where not in met:
            met.add(where)
            return fault
        return fair(request)

    with serving(says) as server:
        metrics = run(step(server.url, mt_bench=MT_BENCH, options={"timeout": 0.7}))
    assert values(metrics)["mt_bench", "score"] == pytest.approx(5.55)
    assert len(server.asked) == 20


def test_as_many_requests_at_a_time_as_the_recipe_says(step: Step) -> None:
    def says(request: dict[str, Any]) -> str:
        time.sleep(0.1)
        return fair(request)

    with serving(says) as server:
        run(step(server.url, mt_bench=MT_BENCH, options={"concurrency": 3}))
    assert server.most_at_once == 3


def test_an_interrupted_step_pays_for_nothing_twice(step: Step) -> None:
    refused = True

    def says(request: dict[str, Any]) -> Answer:
        return 400 if refused and place(request)[0] in (141, 142) else fair(request)

    with serving(says) as server:
        context = step(server.url, mt_bench=MT_BENCH, options={"concurrency": 1})
        with pytest.raises(UserError, match=r"judge: http://127.* answers 400: .*scripted"):
            run(context)
        answered = [place(request) for request in server.asked if place(request)[0] < 141]
        refused = False
        server.asked.clear()
        going_on = replace(context, scratch=context.scratch / "again")
        again = run(going_on)
    assert len(answered) == 6
    assert not {place(request) for request in server.asked} & {*answered}
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
    """Beyond the one request that is under way when it is killed."""
    write_files(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def says(request: dict[str, Any]) -> str:
        time.sleep(0.3)
        return fair(request)

    with serving(says) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        process = start(tmp_path)
        wait_until((len(server.asked) >= 5 for _ in itertools.count()), process)
        process.kill()
        process.communicate()
        before = len(server.asked)
        done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before < 10
    assert {place(request) for request in server.asked} == set(GRADES)
    assert len(server.asked) <= 11
    manifest = json.loads((tmp_path / "runs" / "small" / "judged[base]" / "stage.json").read_text())
    assert values(manifest["metrics"])["mt_bench", "score"] == pytest.approx(5.55)
