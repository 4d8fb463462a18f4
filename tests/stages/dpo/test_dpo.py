"""The dpo stage: its reference is the model that training starts from, with and without LoRA."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from stages.base import Context, Input, UserError
from stages.dpo.config import DPOStage
from stages.dpo.stage import run
from tests.tiny import byte_tokenizer

PAIRS = [
    {"prompt": "Sky? ", "chosen": "blue", "rejected": "a green one"},
    {"prompt": "Snow? ", "chosen": "white", "rejected": "red"},
]


TRAIN = {
    "max_steps": 20, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3,
    "activation_checkpointing": False, "use_cpu": True,
}  # fmt: skip


def run_stage(
    folder: Path, model: Path, rows: list[dict[str, Any]] = PAIRS, evaluate: bool = False, **section: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Run the stage on `rows`, for 20 steps; return its metrics, its log and the folder that it publishes."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in rows))
    data = {"train": "./pairs.jsonl", **({"eval": "./pairs.jsonl"} if evaluate else {}), **section.pop("data", {})}
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    context = Context(
        recipe="r",
        step="dpo",
        config=DPOStage.model_validate({"data": data, "train": TRAIN | section.pop("train", {}), **section}),
        inputs={"model": Input(model), "train": Input(pairs), **({"eval": Input(pairs)} if evaluate else {})},
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        progress=lambda *_: None,
    )
    metrics = run(context)
    log = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
    return metrics.to_json(), log, folder / "out"


LORA = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}


@pytest.mark.parametrize("section", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_reference_is_the_starting_point(tmp_path: Path, model_folder: Path, section: dict[str, Any]) -> None:
    """While model and reference agree, the loss is -log sigmoid(0) = ln 2 and margins are 0; then the loss falls."""
    metrics, log, out = run_stage(tmp_path, model_folder, **section)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log[19]["loss"] < 0.9 * math.log(2)
    assert metrics["reward_margin"] > 0
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_weights_are_those_of_trls_own_trainer(tmp_path: Path, model_folder: Path, lora: dict[str, Any] | None) -> None:
    """TRL's DPOTrainer on the rows themselves, with the same arguments and seed."""
    rows = [*PAIRS, {"prompt": "Coal? ", "chosen": "black", "rejected": "blue and a bit of white"}]
    trl_folder = tmp_path / "trl"
    args = DPOConfig(str(trl_folder), report_to="none", save_strategy="no", bf16=False, seed=23, **TRAIN)
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
    )
    trainer.train()
    expected = (trainer.model.merge_and_unload() if lora else trainer.model).state_dict()
    _, _, out = run_stage(tmp_path, model_folder, rows, **({"lora": lora} if lora else {}))
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_figures_of_a_step(tmp_path: Path, model_folder: Path) -> None:
    """stage.json has the last values of the log, and those of the evaluation. A random model: about -ln 258 a token."""
    rows = [*PAIRS, {"prompt": "p" * 40, "chosen": "a", "rejected": "b"}, {"prompt": "p"}]
    options = {"data": {"on_bad_row": "drop"}, "train": {"max_length": 32, "max_steps": 2}}
    metrics, log, out = run_stage(tmp_path, model_folder, rows, evaluate=True, **options)
    last = [row for row in log if "rewards/margins" in row][-1]
    for name, key in {
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "chosen_logps": "logps/chosen",
        "rejected_logps": "logps/rejected",
    }.items():
        assert metrics[name] == last[key]
        assert f"eval_{key}" in metrics
    assert log[0]["logps/chosen"] == pytest.approx(-math.log(258) * (5 + 6) / 2, rel=0.1)
    for part in ("train", "eval"):
        counts = metrics["data"][part]
        assert [counts[name] for name in ("rows", "rows_used", "rows_bad", "rows_too_long")] == [4, 2, 1, 1]
    assert (out / "dropped_rows.txt").read_text().splitlines() == 2 * [
        "pairs.jsonl:4: column 'chosen' is missing; the row has prompt",
        "pairs.jsonl:3: the prompt fills max_length",
    ]
    assert "eval data: 1 rows that cannot be used were dropped; dropped_rows.txt lists them" in metrics["notes"]


def test_completions_that_do_not_stop(tmp_path: Path, model_folder: Path) -> None:
    """This template ends no turn."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    rows = [
        {"prompt": [{"role": "user", "content": "Sky?"}]}
        | {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "blue"), ("rejected", "red"))}
    ]
    metrics, _, _ = run_stage(tmp_path, tmp_path / "model", rows, train={"max_steps": 1})
    assert metrics["data"]["train"]["rows_without_stop"] == 1
    assert metrics["notes"] == [
        "train data: 1 chosen completions have no token that stops generation, so the model does not learn to stop"
    ]


def test_token_ids_beyond_the_vocabulary(tmp_path: Path, model_folder: Path) -> None:
    """A tokenizer with more tokens than the model: 258 ids are 0 to 257."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [*PAIRS, {"prompt": "Coal? ", "chosen": "black", "rejected": "<new>"}]
    expected = "the train data contain the token id 258, but the model's ids are 0 to 257"
    with pytest.raises(UserError, match=expected):
        run_stage(tmp_path, tmp_path / "model", rows)


@pytest.mark.parametrize("section", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_reference_computed_before_training(tmp_path: Path, model_folder: Path, section: dict[str, Any]) -> None:
    """TRL caches these log-probabilities beside the pairs, which steps of another ld_alpha share."""
    train = {"precompute_ref_log_probs": True, "max_steps": 2}
    _, log, _ = run_stage(tmp_path, model_folder, train=train, **section)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "cache").symlink_to(tmp_path / "cache")
    _, log, _ = run_stage(tmp_path / "2", model_folder, train=train | {"ld_alpha": 0.5}, **section)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
