"""Checks of a judge stage before anything runs, and a judgement by a real server."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.base import Context, UserError
from stages.judge import endpoint
from stages.judge.config import JudgeStage
from stages.judge.questions import CHARACTERS_PER_TOKEN
from stages.judge.stage import run
from tests.pipeline.run.test_command import command, environment
from tests.stages.judge.conftest import ALPACA_EVAL, INSTRUCTIONS, MT_BENCH, PROMPTS, QUESTIONS, write_files
from tests.stages.judge.server import KEY, serving
from tests.tiny import byte_tokenizer, tiny_model

Step = Callable[..., Context]
require_model = endpoint.require_model.__wrapped__  # asks at every call
RECIPE = """\
name: small
model: ./model
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: {max_steps: 2}
  judged:
    kind: judge
    models: [wit]
    judge: gpt-judge
    mt_bench: {questions: ./questions.jsonl, references: ./references.jsonl, prompts: ./prompts.jsonl}
    options: {max_new_tokens: 4}
"""


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_unreachable_endpoint(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{closed_port}/v1")
    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{closed_port} \(OPENAI_BASE_URL\) cannot be reached"):
        require_model("gpt-judge")


def test_a_wrong_key_no_key_and_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _: "", models=("gpt-judge", "gpt-judge-mini", "other")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
            require_model("gpt-judge")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(UserError, match=r"refuses the key in OPENAI_API_KEY \(401\)") as error:
            require_model("gpt-judge")
        assert "sk-wrong" not in str(error.value)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(UserError, match="has no model 'gpt-jugde'; it has gpt-judge"):
            require_model("gpt-jugde")
        require_model("gpt-judge")
    monkeypatch.setenv("OPENAI_BASE_URL", "file:///etc")
    with pytest.raises(UserError, match="not an http or https address"):
        require_model("gpt-judge")


def test_the_command_checks_the_endpoint_before_training(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    write_files(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{closed_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    process = command(tmp_path)
    assert process.returncode == 2
    assert "r.yaml:12:12: stages.judged.judge: http://127.0.0.1" in process.stderr, process.stderr
    assert "cannot be reached" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs" / "small").exists()
    planned = command(tmp_path, "--plan")
    assert planned.returncode == 0, "--plan sends no request"
    assert "asks judged[wit]: gpt-judge: MT-Bench, 10 calls, at most about" in planned.stdout


def test_calls_are_estimated_once_the_files_are_fetched(tmp_path: Path, model_folder: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    content = (tmp_path / "questions.jsonl").read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    reference = f"questions: 'pypi:asked==1.0#asked/questions.jsonl@sha256:{sha}'"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("questions: ./questions.jsonl", reference))
    planned = command(tmp_path, "--plan")
    assert "asks judged[wit]: gpt-judge: the number of calls is known once its files are here" in planned.stdout
    fetched = tmp_path / "runs" / "cache" / "pypi" / sha
    fetched.mkdir(parents=True)
    (fetched / "questions.jsonl").write_bytes(content)
    planned = command(tmp_path, "--plan")
    assert "asks judged[wit]: gpt-judge: MT-Bench, 10 calls, at most about" in planned.stdout


def test_request_estimates(tmp_path: Path) -> None:
    """Input tokens, by hand: the judge's prompts, questions, reference answers, and answers of full length."""
    write_files(tmp_path)
    stage = JudgeStage(
        models=["wit"],
        judge="j",
        mt_bench=MT_BENCH,
        alpaca_eval=ALPACA_EVAL,
        options={"max_new_tokens": 100, "limit": 1},
    )
    files = {f"mt_bench.{name}": tmp_path / file for name, file in MT_BENCH.items()}
    files |= {"alpaca_eval.instructions": tmp_path / "instructions.jsonl"}
    first, second = stage.request_estimates(files)

    def tokens(text: str) -> int:
        return -(-len(text) // CHARACTERS_PER_TOKEN)

    one, two = (prompt for prompt in PROMPTS if prompt["name"] in ("single-v1", "single-v1-multi-turn"))
    prompts = tokens(one["system_prompt"] + one["prompt_template"])
    prompts += tokens(two["system_prompt"] + two["prompt_template"])
    turns = 2 * tokens(QUESTIONS[0]["turns"][0]) + tokens(QUESTIONS[0]["turns"][1])  # type: ignore[index]
    assert (first.calls, first.tokens_in) == (2, prompts + turns + 300)
    assert (second.calls, second.tokens_out) == (1, 1)
    comparison = tokens(str(INSTRUCTIONS[0]["instruction"])) + tokens(str(INSTRUCTIONS[0]["output"]))
    assert second.tokens_in == comparison + 350 + 100


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "needs mt_bench, alpaca_eval or both"),
        ({"alpaca_eval": ALPACA_EVAL, "judge": ""}, "at least 1 character"),
        ({"alpaca_eval": ALPACA_EVAL, "options": {"concurrency": 0}}, "greater than or equal to 1"),
    ],
)
def test_invalid_sections_are_rejected(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JudgeStage(**({"models": ["wit"], "judge": "j"} | section))


def test_answers_must_fit_the_models_context(tmp_path: Path, model_folder: Path) -> None:
    stage = JudgeStage(models=["wit"], judge="j", alpaca_eval=ALPACA_EVAL)
    with pytest.raises(UserError, match="1024 tokens are more than the 256") as error:
        stage.check({"model": model_folder})
    assert error.value.key == "options.max_new_tokens"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "questions",
            {"question_id": 1, "category": "math", "turns": ["a", "b"]},
            "the references have no answer to 1",
        ),
        (
            "questions",
            {"question_id": 1, "category": "stem", "turns": ["a"]},
            "column 'turns' holds 1; MT-Bench has two",
        ),
        ("questions", {"category": "stem", "turns": ["a", "b"]}, "column 'question_id' is missing"),
        (
            "prompts",
            {"name": "single-v1", "system_prompt": "a", "prompt_template": "b"},
            "has no prompt named single-math",
        ),
        ("instructions", {"instruction": "a", "generator": "x"}, "column 'output' is missing"),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    write_files(tmp_path)
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    stage = JudgeStage(models=["wit"], judge="j", mt_bench=MT_BENCH, alpaca_eval=ALPACA_EVAL)
    files = {f"mt_bench.{part}": tmp_path / file for part, file in MT_BENCH.items()}
    with pytest.raises(UserError, match=rf"{name}\.jsonl.*{message}"):
        stage.request_estimates(files | {"alpaca_eval.instructions": tmp_path / "instructions.jsonl"})


# ------------------------------------------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained to answer [[7]] to everything."""
    tokenizer, model = byte_tokenizer(), tiny_model(3)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    verdict = tokenizer("[[7]]<end>")["input_ids"]
    for _ in range(150):
        prompts = torch.randint(32, 120, (8, int(torch.randint(20, 60, ())))).tolist()
        ids = torch.tensor([[*row, *tokenizer("\nassistant:")["input_ids"], *verdict] for row in prompts])
        labels = ids.clone()
        labels[:, : -len(verdict)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("lenient")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(lenient: Path) -> Iterator[str]:
    """The address of `transformers serve` with that model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call = [str(Path(sys.executable).with_name("transformers")), "serve", str(lenient), "--port", str(port)]
    call += ["--host", "127.0.0.1", "--device", "cpu"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_real_server_judges(step: Step, served: str, lenient: Path) -> None:
    context = step(served, judge=str(lenient), mt_bench=MT_BENCH, options={"concurrency": 2, "retries": 1})
    assert os.environ["OPENAI_BASE_URL"] == served
    metrics = run(context)
    scores = {(row.task, row.metric): row.value for row in metrics.results or []}
    assert scores["mt_bench", "score"] == 7
    assert metrics.notes == []
