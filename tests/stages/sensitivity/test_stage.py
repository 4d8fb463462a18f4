"""The index of a real model, compared with the authors' package and with the formula in float64."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_sensitivity_index.models import HFModel
from prompt_sensitivity_index.posix import PosixConfig, get_prompt_sensitivity
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.base import Context, Input, UserError
from stages.evaluation.answer_log import AnswerLog
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.stage import psi, run

SETS = [
    ["Q: Who is it?\nA: ", "Q: Who is taht?\nA: ", "q: who?\nA: "],
    ["Q: How many are there?\nA: ", "Q: Count them.\nA: "],
    ["Q: Where?\nA: ", "Q: In which place?\nA: ", "Q: WHERE?\nA: ", "Where is it, please, and since when?"],
]
Step = Callable[..., Context]


@pytest.fixture
def step(tmp_path: Path, model_folder: Path) -> Step:
    """Return a function that builds a step's context as the pipeline does."""
    numbers = itertools.count()

    def step(
        rows: list[Any], model: Path = model_folder, options: dict[str, Any] | None = None, **entry: Any
    ) -> Context:
        number = next(numbers)
        data = tmp_path / f"{number}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = {"name": "words", "data": str(data), "max_new_tokens": 7} | entry
        config = SensitivityStage(models=["wit"], prompts=[prompts], options=options or {})  # type: ignore[list-item, arg-type]
        inputs = {"model": Input(model, "wit", "sft"), "data.words": Input(data)}
        folders = [tmp_path / f"{number}-{name}" for name in ("out", "scratch", "checkpoints", "cache")]
        for folder in folders:
            folder.mkdir()
        return Context("tiny", "sensitivity[wit]", config, inputs, *folders, progress=lambda *_: None)

    return step


def rows(sets: list[list[str]] = SETS) -> list[Any]:
    return [{"prompts": prompts} for prompts in sets]


def samples(context: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.out / "samples_words.jsonl").open()]


def test_psi_by_hand() -> None:
    """(|-3 - -2| / 2 for the first answer under the second prompt + |-8 - -4| / 4 for the second) / (2 * 1)."""
    assert psi([[-2.0, -8.0], [-3.0, -4.0]], [2, 4]) == pytest.approx((1 / 2 + 4 / 4) / 2)


@pytest.mark.parametrize("batch_size", [64, 512])
def test_equals_the_authors_package(step: Step, model_folder: Path, batch_size: int) -> None:
    options = {"convention": "package", "batch_size": batch_size}
    context = step(rows(), options=options)
    metrics = run(context)
    theirs, trace = get_prompt_sensitivity(HFModel(str(model_folder)), SETS, PosixConfig(max_new_tokens=7))
    (row,) = metrics.results or []
    assert row.value == pytest.approx(theirs, abs=1e-4)
    assert theirs > 0.01, "equal prompts would prove nothing"
    lines = samples(context)
    assert [sample["posix"] for sample in lines] == pytest.approx(trace.prompt_sensitivities, abs=1e-4)
    for sample, matrix in zip(lines, trace.logprob_matrices, strict=True):
        for ours, expected in zip(sample["log_probs"], matrix, strict=True):
            assert ours == pytest.approx(expected, abs=1e-4)
    assert (row.n, row.headline, row.higher_is_better) == (3, True, False)
    mean = sum(trace.prompt_sensitivities) / 3
    variance = sum((index - mean) ** 2 for index in trace.prompt_sensitivities) / 2
    assert row.stderr == pytest.approx(math.sqrt(variance / 3), abs=1e-4)


def by_formula(folder: Path, prompts: list[str], longest: int) -> tuple[float, list[int]]:
    """Compute psi in float64, one sequence at a time, with greedy responses and their own lengths."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ends = {*model.generation_config.eos_token_id}

    @torch.no_grad()
    def logs(tokens: list[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)

    def answer(prompt: list[int]) -> list[int]:
        new: list[int] = []
        while len(new) < longest and not ends & {*new}:
            new.append(int(logs([*prompt, *new])[-1].argmax()))
        return new

    def log_p(prompt: list[int], response: list[int]) -> float:
        table = logs([*prompt, *response])
        return sum(float(table[len(prompt) + k - 1, token]) for k, token in enumerate(response))

    responses = [answer(prompt) for prompt in encoded]
    total = sum(
        abs(log_p(x_i, y) - log_p(x_j, y)) / len(y)
        for x_i in encoded
        for x_j, y in zip(encoded, responses, strict=True)
    )
    return total / (len(prompts) * (len(prompts) - 1)), [len(response) for response in responses]


@pytest.fixture(scope="module")
def stopping(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a frequent token as a further EOS, so that its answers differ in length."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("stopping") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)(SETS[1][0], return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=7, do_sample=False)[0, prompt.shape[1] :]
    model.generation_config.eos_token_id = [model.config.eos_token_id, int(answer[-1])]
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [64, 512])
def test_equals_the_formula_over_each_response_s_own_length(step: Step, stopping: Path, batch_size: int) -> None:
    context = step(rows(), model=stopping, options={"batch_size": batch_size, "dtype": "float32"})
    run(context)
    expected = [by_formula(stopping, prompts, 7) for prompts in SETS]
    lines = samples(context)
    assert [sample["lengths"] for sample in lines] == [lengths for _, lengths in expected]
    assert [sample["posix"] for sample in lines] == pytest.approx([index for index, _ in expected], abs=1e-5)
    assert len({length for _, lengths in expected for length in lengths}) > 1, "else both conventions agree"


def test_the_chat_template_is_applied(step: Step, model_folder: Path) -> None:
    """The scores are those of prompts that contain the template's text."""
    bare = [{"prompts": ["Who?", "Which?"]}]
    written_out = [{"prompts": [f"system: Be kind.\nuser: {words}\nassistant:" for words in ("Who?", "Which?")]}]
    metrics = run(step(bare, options={"apply_chat_template": True, "system_instruction": "Be kind."}))
    assert metrics.results == run(step(written_out)).results


def test_errors_before_the_first_answer(step: Step, model_folder: Path, tmp_path: Path) -> None:
    long = [{"prompts": ["Who?", "Which?"]}, {"prompts": ["who? " * 50, "a"]}]
    with pytest.raises(
        UserError, match=r"prompts\.words: row 2 of .*: 250 tokens and an answer of 7 are more than the 256"
    ):
        run(step(long))
    config = step(rows(), max_new_tokens=257).config
    with pytest.raises(UserError, match="257 tokens are more than the 256") as error:
        config.check({"model": model_folder, "data.words": Path(config.prompts[0].data)})
    assert error.value.key == "prompts.0.max_new_tokens"
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="the tokenizer of wit has no chat template"):
        run(step(rows(), model=bare, options={"apply_chat_template": True}))
    with pytest.raises(UserError, match="wit cannot be loaded"):
        run(step(rows(), model=tmp_path))


def test_samples_have_the_form_of_an_lm_eval_stage(step: Step) -> None:
    """The report pairs the sets of two models by it."""
    context = step(rows())
    metrics = run(context)
    assert metrics.samples == {"words": "samples_words.jsonl"}
    assert metrics.results
    lines = samples(context)
    assert [sample["doc_id"] for sample in lines] == [0, 1, 2]
    assert len({sample["doc_hash"] for sample in lines}) == 3
    assert math.fsum(sample["posix"] for sample in lines) / 3 == pytest.approx(metrics.results[0].value)
    assert all(re.fullmatch(r"[0-9a-f]{64}", sample["doc_hash"]) for sample in lines)
    assert lines[0]["prompts"] == SETS[0]
    other = run(replace(step(rows()), out=context.scratch))
    assert other.results == metrics.results


def test_an_interrupted_step_resumes(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the answers it has, and ends with the same bytes."""
    sets = rows() * 40
    uninterrupted = step(sets)
    expected = run(uninterrupted)
    add, calls = AnswerLog.add, 0

    def dies(log: AnswerLog, values: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        add(log, values)
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerLog, "add", dies)
    context = step(sets)
    with pytest.raises(KeyboardInterrupt):
        run(context)
    kept = (context.checkpoints / "answers.jsonl").read_bytes()
    assert kept
    assert run(context).results == expected.results
    assert (context.checkpoints / "answers.jsonl").read_bytes().startswith(kept), "nothing was asked again"
    assert (context.out / "samples_words.jsonl").read_bytes() == (
        uninterrupted.out / "samples_words.jsonl"
    ).read_bytes()
