"""`select`: the published model is the best of several points, and what a recipe says wrongly about it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import KINDS
from stages.base import Context, Input, UserError
from stages.records.metrics import Metrics
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TRAIN = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(8)]
EVAL = [{"prompt": f"{n} + 1 = ", "completion": f"{7 - n}"} for n in range(4)]
PAIRS = [{"prompt": f"{n}? ", "chosen": f"{n + 1}", "rejected": "no"} for n in range(8)]
EVAL_PAIRS = [{"prompt": f"{n}! ", "chosen": "no", "rejected": f"{n + 1}"} for n in range(4)]
OPTIONS = {
    "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "logging_steps": 5,
}  # fmt: skip
SFT = {"data": {"train": "t", "eval": "e"}, "weights": {"prompt": 0.2, "completion": 0.8}, "train": OPTIONS}
DPO = {"data": {"train": "t", "eval": "e"}, "train": OPTIONS}
LORA = {"r": 2, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": "olora"}


def train(folder: Path, model: Path, kind: str, section: dict[str, Any], **changes: Any) -> tuple[Metrics, Path]:
    """Run a stage on rows of its kind; return its metrics and the folder that it publishes."""
    folder.mkdir()
    rows = {"train": TRAIN, "eval": EVAL} if kind == "sft" else {"train": PAIRS, "eval": EVAL_PAIRS}
    inputs = {"model": Input(model)}
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        inputs[name] = Input(file, fingerprint=f"{kind} {name}")
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    section = section | {"train": section["train"] | changes.pop("train", {})} | changes
    context = Context(
        recipe="r",
        step="s",
        config=KINDS[kind].model_validate(section),
        inputs=inputs,
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        progress=lambda *_: None,
    )
    return KINDS[kind].load("run")(context), folder / "out"


def completion_loss(folder: Path) -> float:
    """The mean loss of a completion token of EVAL and its end, in float64 and one row at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), byte_tokenizer()
    losses = []
    for row in EVAL:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        tokens = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        losses += (-log_probs[range(len(tokens) - 1), tokens[1:]])[len(prompt) - 1 :].tolist()
    return sum(losses) / len(losses)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(("lora", "ends_at"), [(None, (3, 6, 9, 10)), (LORA, (9, 10))], ids=["full", "LoRA"])
def test_the_model_with_the_lowest_loss_is_published(
    tmp_path: Path, model_folder: Path, lora: dict[str, Any] | None, ends_at: tuple[int, ...]
) -> None:
    """Trainings that end after 3, 6, 9 and 10 steps have the models of the points; their losses are computed apart."""
    select = {"metric": "eval_completion_loss", "every": 3}
    metrics, published = train(tmp_path / "select", model_folder, "sft", SFT, select=select, lora=lora)
    ends = {
        n: train(tmp_path / f"{n}", model_folder, "sft", SFT, lora=lora, train={"max_steps": n})[1] for n in ends_at
    }
    losses = {step: completion_loss(folder) for step, folder in ends.items()}
    result = metrics.to_json()
    points = {point["step"]: point["eval_completion_loss"] for point in result["points"]}
    assert list(points) == [3, 6, 9, 10]
    assert {step: points[step] for step in losses} == pytest.approx(losses, rel=1e-5)
    best = min(losses, key=lambda step: losses[step])
    assert result["selected_step"] == min(points, key=lambda step: points[step]) == best
    assert best < 10, "the last point is not the best, or the test would show nothing"
    assert weights(published) == weights(ends[best])
    assert completion_loss(published) == losses[best]
    assert result["eval_completion_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert result["notes"][0].startswith(f"publishes the model after step {best} of 10: its eval_completion_loss,")
    assert f"| selected_step | {best} |" in (published / "README.md").read_text()


def test_the_highest_margin_of_pairs_is_published(tmp_path: Path, model_folder: Path) -> None:
    """The evaluation pairs prefer the opposite, so that their margin falls; the first point has the highest."""
    select = {"metric": "eval_rewards/margins", "every": 4}
    metrics, published = train(tmp_path / "select", model_folder, "dpo", DPO, select=select)
    first = train(tmp_path / "4", model_folder, "dpo", DPO, train={"max_steps": 4})
    points = metrics.to_json()["points"]
    margins = [point["eval_rewards/margins"] for point in points]
    assert [point["step"] for point in points] == [4, 8, 10]
    assert margins == sorted(margins, reverse=True)
    assert metrics.to_json()["selected_step"] == 4
    assert margins[0] == pytest.approx(first[0].to_json()["eval_rewards/margins"])
    assert weights(published) == weights(first[1])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_every_metric_that_can_be_named_is_logged(tmp_path: Path, model_folder: Path, kind: str) -> None:
    section = SFT if kind == "sft" else DPO
    metrics = train(tmp_path / kind, model_folder, kind, section, train={"max_steps": 1})[0].to_json()
    assert KINDS[kind].eval_metrics.keys() <= metrics.keys()  # type: ignore[attr-defined]


def test_a_training_shorter_than_the_interval_is_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match="is 10, but the training has 10 steps, so its last step is the only point"):
        train(tmp_path / "it", model_folder, "sft", SFT, select={"metric": "eval_loss", "every": 10})
