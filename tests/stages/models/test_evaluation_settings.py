"""A checkpoint's generation defaults and a tokenizer that appends EOS change no evaluation, on any path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.base import Context, Input
from stages.characteristics.config import CharacteristicsStage
from stages.characteristics.stage import run as run_characteristics
from stages.judge.stage import run as run_judge
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.stage import run as run_lm_eval
from stages.models.tokenizer import remove_appended_eos
from stages.records.metrics import Metrics
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.stage import run as run_sensitivity
from tests.stages.judge.conftest import MT_BENCH, step
from tests.stages.judge.server import serving
from tests.stages.lm_eval.conftest import GENERATE, model_path, own_data, world

__all__ = ["model_path", "step", "world"]  # fixtures

DEFAULTS = {"repetition_penalty": 1.8, "num_beams": 3, "min_p": 0.2, "temperature": 0.3, "top_k": 3, "top_p": 0.5}
DEFAULTS |= {"do_sample": True, "no_repeat_ngram_size": 2, "suppress_tokens": [40, 41], "max_new_tokens": 3}
NOTE = "the checkpoint's generation defaults are not used, since they would change its scores:"


@pytest.fixture
def with_defaults(model_path: Path, tmp_path: Path) -> Path:
    """A copy of the model whose generation config sets everything that could change an answer."""
    folder = shutil.copytree(model_path, tmp_path / "with-defaults")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | DEFAULTS))
    return folder


@pytest.fixture
def appending(model_path: Path, tmp_path: Path) -> Path:
    """A copy of the model whose tokenizer ends every text with EOS."""
    folder = shutil.copytree(model_path, tmp_path / "appending")
    state = json.loads((folder / "tokenizer.json").read_text())
    eos = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "special_tokens": {"</s>": eos},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"][-1] == 2
    return folder


def context_of(tmp_path: Path, config: Any, inputs: dict[str, Input], name: str) -> Context:
    folders = [tmp_path / f"{name}-{folder}" for folder in ("out", "scratch", "checkpoints", "cache")]
    for folder in folders:
        folder.mkdir(parents=True)
    return Context("tiny", "step", config, inputs, *folders, progress=lambda *_: None)


def lm_eval(tmp_path: Path, model: Path, world: Path) -> tuple[Metrics, Any]:
    entry = own_data("tiny_generate")
    settings = {key: value for key, value in GENERATE["generation_kwargs"].items() if key != "do_sample"}
    folder = tmp_path / f"{model.name}-tasks"
    folder.mkdir()
    (folder / "t.yaml").write_text(json.dumps(GENERATE | {"generation_kwargs": settings}))
    config = LMEvalStage(models=["wit"], include_path="tasks", tasks=[entry], options={})  # type: ignore[arg-type, list-item]
    inputs = {f"data.tiny_generate.{split}": Input(world / f"{split}.jsonl") for split in ("test", "dev")}
    inputs |= {"model": Input(model, "wit", "sft"), "include_path": Input(folder)}
    context = context_of(tmp_path / "lm_eval", config, inputs, model.name)
    metrics = run_lm_eval(context)
    lines = [json.loads(line) for line in (context.out / "samples_tiny_generate.jsonl").open()]
    return metrics, [line["resps"] for line in lines]


def judge(tmp_path: Path, model: Path, step: Callable[..., Context]) -> tuple[Metrics, Any]:
    with serving(lambda _: "Rating: [[7]]") as server:
        context = step(server.url, model=model, mt_bench=MT_BENCH)
        metrics = run_judge(context)
    lines = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    return metrics, [line["responses"] for line in lines]


def sensitivity(tmp_path: Path, model: Path) -> tuple[Metrics, Any]:
    data = tmp_path / f"{model.name}-prompts.jsonl"
    data.write_text('{"prompts": ["Who is it?", "Who is that?", "who?"]}\n')
    prompts = {"name": "words", "data": str(data), "max_new_tokens": 7}
    config = SensitivityStage(models=["wit"], prompts=[prompts])  # type: ignore[list-item]
    inputs = {"model": Input(model, "wit", "sft"), "data.words": Input(data)}
    metrics = run_sensitivity(context_of(tmp_path / "sensitivity", config, inputs, model.name))
    return metrics, [row.value for row in metrics.results or []]


@pytest.fixture(params=["lm_eval", "judge", "sensitivity"])
def evaluate(request: pytest.FixtureRequest, tmp_path: Path, world: Path) -> Callable[[Path], tuple[Metrics, Any]]:
    """A function that evaluates a model on one of the three paths, and returns metrics and answers."""
    if request.param == "lm_eval":
        return lambda model: lm_eval(tmp_path, model, world)
    if request.param == "judge":
        step = request.getfixturevalue("step")
        return lambda model: judge(tmp_path, model, step)
    return lambda model: sensitivity(tmp_path, model)


def test_generation_defaults_change_nothing_and_are_noted(
    evaluate: Callable[[Path], tuple[Metrics, Any]], model_path: Path, with_defaults: Path
) -> None:
    plain, answers = evaluate(model_path)
    metrics, with_them = evaluate(with_defaults)
    assert with_them == answers
    assert metrics.results == plain.results
    assert metrics.environment["removed_generation_defaults"] == DEFAULTS
    (note,) = metrics.notes
    assert note.startswith(f"wit: {NOTE} ")
    assert all(f"{key}: {json.dumps(value)}" in note for key, value in DEFAULTS.items())
    assert plain.notes == []
    assert plain.environment["removed_generation_defaults"] == {}


def test_these_defaults_would_change_an_answer(model_path: Path, with_defaults: Path) -> None:
    """Otherwise the test above could not fail."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer("What is it?", return_tensors="pt")
    plain, changed = (
        AutoModelForCausalLM.from_pretrained(path).generate(**ids, do_sample=False, max_new_tokens=6)
        for path in (model_path, with_defaults)
    )
    assert not torch.equal(plain, changed)


def test_a_prompt_does_not_end_with_eos(
    evaluate: Callable[[Path], tuple[Metrics, Any]], model_path: Path, appending: Path
) -> None:
    plain, answers = evaluate(model_path)
    metrics, with_it = evaluate(appending)
    assert with_it == answers
    assert metrics.results == plain.results


def test_characteristics_of_prompts_do_not_include_an_appended_eos(
    model_path: Path, appending: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Who is it?", "completion": "Ann."}\n{"prompt": "And he?", "completion": "Ben."}\n')

    def measure(model: Path) -> Any:
        entry = {"name": "rows", "data": {"train": str(data)}, "role": "train"}
        config = CharacteristicsStage(models=["wit"], sets=[entry])  # type: ignore[list-item]
        inputs = {"model": Input(model, "wit", "sft"), "data.rows": Input(data)}
        return run_characteristics(context_of(tmp_path / "characteristics", config, inputs, model.name)).results

    assert measure(appending) == measure(model_path)


@pytest.mark.parametrize("form", ["roberta", "sequence", "bos and eos"])
def test_eos_is_removed_from_post_processors_of_all_forms(model_path: Path, tmp_path: Path, form: str) -> None:
    folder = shutil.copytree(model_path, tmp_path / "other")
    state = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>")]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [*pieces[:1], text, *pieces[1:]],
        "pair": [*pieces[:1], text, {"Sequence": {"id": "B", "type_id": 0}}, *pieces[1:]],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in (("<s>", 1), ("</s>", 2))},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    state["post_processor"] = {
        "roberta": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
        | {"trim_offsets": False, "add_prefix_space": False},
        "sequence": {"type": "Sequence", "processors": [byte_level, template]},
        "bos and eos": template,
    }[form]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer("ab")["input_ids"]
    assert before[0] == 1
    assert before[-1] == 2
    remove_appended_eos(tokenizer)
    assert tokenizer("ab")["input_ids"] == before[:-1]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == before[1:-1]
