"""Characteristics, compared with hand calculations and with the loss that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.base import Context, Input, UserError
from stages.characteristics.config import CharacteristicsStage
from stages.characteristics.stage import ngram_diversity, run, tree_depth

TRAIN = [
    {"prompt": "Who is it?", "completion": " Ann"},
    {"prompt": "Who is it now?", "completion": " It is Ben."},
]
QUESTIONS = [{"question": "How many are there?"}, {"question": "How many?"}]


@pytest.fixture
def context(tmp_path: Path, model_folder: Path) -> Context:
    for name, rows in {"train": TRAIN, "questions": QUESTIONS}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets: list[dict[str, Any]] = [
        {"name": "train", "role": "train", "data": {"train": "./train.jsonl"}},
        {
            "name": "know",
            "role": "eval",
            "data": {"train": "./questions.jsonl", "format": "text", "columns": {"text": "question"}},
        },
    ]
    config = CharacteristicsStage(models=["base"], sets=sets, options={})  # type: ignore[arg-type]
    inputs = {"model": Input(model_folder)}
    inputs |= {"data.train": Input(tmp_path / "train.jsonl"), "data.know": Input(tmp_path / "questions.jsonl")}
    folders = [tmp_path / name for name in ("out", "scratch", "checkpoints", "cache")]
    for folder in folders:
        folder.mkdir()
    return Context("tiny", "characteristics[base]", config, inputs, *folders, progress=lambda *_: None)


def test_equals_transformers(context: Context, model_folder: Path) -> None:
    metrics = run(context)
    values = {(row.task, row.metric): row.value for row in metrics.results or []}
    assert not any(row.headline for row in metrics.results or [])
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert values["model", "parameters"] == sum(p.numel() for p in model.parameters())
    all_prompts = {"train": [row["prompt"] for row in TRAIN], "know": [row["question"] for row in QUESTIONS]}
    for name, prompts in all_prompts.items():
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        assert values[name, "prompt_length"] == pytest.approx(sum(map(len, ids)) / 2)
        total = sum(
            -float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.detach()) * (len(row) - 1)
            for row in ids
        )
        mean = total / sum(len(row) - 1 for row in ids)
        assert values[name, "prompt_logprob"] == pytest.approx(mean, abs=1e-5)
    ratios = [
        len(tokenizer(row["completion"])["input_ids"]) / len(tokenizer(row["prompt"])["input_ids"]) for row in TRAIN
    ]  # type: ignore[arg-type]
    assert values["train", "generation_ratio"] == pytest.approx(sum(ratios) / 2)
    assert ("know", "generation_ratio") not in values, "the questions have no responses"
    # Who is it? / Who is it now?: 5 of 7 words are distinct, 4 of 5 bigrams, 3 of 3 trigrams, 1 of 1 4-grams
    assert values["train", "ngram_diversity"] == pytest.approx(5 / 7 + 4 / 5 + 1 + 1)
    assert metrics.notes == ["parse_tree_depth is not measured: spaCy with en_core_web_sm is not installed"]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b a"], 2 / 3 + 1 + 1),
        (["a b", "a b"], 1 / 2 + 1 / 2),
        (["a b c d e"], 4),
        (["x x x x x"], 1 / 5 + 1 / 4 + 1 / 3 + 1 / 2),
        ([""], 0),
    ],
)
def test_ngrams_by_hand(texts: list[str], expected: float) -> None:
    assert ngram_diversity(texts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("heads", "depth"), [([], 0), ([0], 1), ([1, 1, 1, 2], 3), ([0, 0, 1, 2, 3], 5), ([1, 1, 3, 3, 3, 4], 3)]
)
def test_depth_by_hand(heads: list[int], depth: int) -> None:
    """A word's head by index; a root is its own head. The last case has two trees."""
    assert tree_depth(heads) == depth


def test_errors_before_it_runs(context: Context, tmp_path: Path) -> None:
    files = {name: source.path for name, source in context.inputs.items()}
    context.config.check(files)
    (tmp_path / "questions.jsonl").write_text('{"text": "no question"}\n')
    with pytest.raises(UserError, match=r"questions.jsonl:1: column 'question' is missing"):
        context.config.check(files)


@pytest.mark.parametrize("prompts", [["A", "B"], ["A", "Bee"]])
def test_only_tokens_after_the_first_have_a_log_probability(
    context: Context, model_folder: Path, tmp_path: Path, prompts: list[str]
) -> None:
    """A prompt of one byte, which is one token, adds nothing. Without other prompts there is no value."""
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "completion": " C"}) + "\n" for prompt in prompts)
    )
    values = {(row.task, row.metric): row.value for row in run(context).results or []}
    expected = None
    if "Bee" in prompts:
        ids = torch.tensor([AutoTokenizer.from_pretrained(model_folder)("Bee")["input_ids"]])
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
        log_probs = model(ids).logits.detach().log_softmax(-1)[0]
        expected = pytest.approx(float(log_probs[0, ids[0, 1]] + log_probs[1, ids[0, 2]]) / 2, abs=1e-5)
    assert values.get(("train", "prompt_logprob")) == expected
    assert values["train", "prompt_length"] == sum(map(len, prompts)) / 2
    assert ("know", "prompt_logprob") in values
