"""`select`: the published model is the best of several points, and what a recipe says wrongly about it is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import cli
from stages.base import Context, Input, UserError
from stages.kinds import KINDS
from stages.records.metrics import Metrics
from tests.stages.lm_eval.conftest import CHOICE
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TRAIN = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(8)]
EVAL = [{"prompt": f"{n} + 1 = ", "completion": f"{7 - n}"} for n in range(4)]
PAIRS = [{"prompt": f"{n}? ", "chosen": f"{n + 1}", "rejected": "no"} for n in range(8)]
EVAL_PAIRS = [{"prompt": f"{n}! ", "chosen": "no", "rejected": f"{n + 1}"} for n in range(4)]
ITEMS = [{"question": f"{n} + 1 =", "choices": [f"{n + 1}", f"{7 - n}"], "answer": n % 2} for n in (0, 1, 2, 4, 5, 6)]
OPTIONS = {
    "max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "logging_steps": 5,
}  # fmt: skip
SFT = {"data": {"train": "t", "eval": "e"}, "weights": {"prompt": 0.2, "completion": 0.8}, "train": OPTIONS}
DPO = {"data": {"train": "t", "eval": "e"}, "train": OPTIONS}
LORA = {"r": 2, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": "olora"}


def context_of(folder: Path, model: Path, kind: str, section: dict[str, Any], **changes: Any) -> Context:
    """The context of a stage on rows of its kind, again if the folder exists."""
    folder.mkdir(exist_ok=True)
    rows = {"train": TRAIN, "eval": EVAL} if kind == "sft" else {"train": PAIRS, "eval": EVAL_PAIRS}
    inputs = {"model": Input(model)}
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        inputs[name] = Input(file, fingerprint=f"{kind} {name}")
    for name in ("out", "scratch"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    section = section | {"train": section["train"] | changes.pop("train", {})} | changes
    config = KINDS[kind].model_validate(KINDS[kind].model_validate(section).model_dump())  # as a worker gets it
    files = {name: need for name, need in config.needs().items() if name not in ("model", "train", "eval")}
    return Context(
        recipe="r",
        step="s",
        config=config,
        inputs=inputs | {name: Input(Path(need.value)) for name, need in files.items()},
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        progress=lambda *_: None,
    )


def train(folder: Path, model: Path, kind: str, section: dict[str, Any], **changes: Any) -> tuple[Metrics, Path]:
    """Run a stage on rows of its kind; return its metrics and the folder that it publishes."""
    context = context_of(folder, model, kind, section, **changes)
    return KINDS[kind].load("run")(context), context.out


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


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A task with the items of EVAL, each with two answers to choose from, as a `select` names it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "sums.yaml").write_text(yaml.safe_dump(CHOICE | {"task": "sums", "doc_to_text": "{{question}}"}))
    data = {"test": str(folder / "items.jsonl")}
    return {"task": "sums", "metric": "acc", "data": data, "include_path": str(folder), "every": 3}


def accuracy(folder: Path) -> float:
    """How often the right answer is the more probable one, in float64 and one answer at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), byte_tokenizer()
    right = 0
    for item in ITEMS:
        scores = []
        for answer in item["choices"]:
            prompt, tokens = tokenizer(item["question"])["input_ids"], tokenizer(f" {answer}")["input_ids"]
            log_probs = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(log_probs[range(len(tokens)), tokens].sum().item())
        right += scores.index(max(scores)) == item["answer"]
    return right / len(ITEMS)


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


RECIPE = """\
name: small
model: ./model
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
  bench: {kind: lm_eval, models: [base], include_path: ./tasks, tasks: [{task: sums, data: {test: ./items.jsonl}}]}
  wording: {kind: sensitivity, models: [wit], prompts: [{name: p, data: ./prompts.jsonl, max_new_tokens: 1}]}
"""
REFUSED = {
    "data.eval is missing": (
        ["select={metric: eval_loss, every: 2}"],
        ": stages.wit.select.metric: is measured on evaluation data, and there are none; add data.eval",
    ),
    "no such metric": (
        ["data.eval=./items.jsonl", "select={metric: completion_loss, every: 2}"],
        "select.metric: 'completion_loss' is no metric of stages of kind sft; did you mean 'eval_completion_loss'?",
    ),
    "evaluated twice": (
        ["data.eval=./items.jsonl", "select={metric: eval_loss, every: 2}", "train={eval_strategy: steps}"],
        "train.eval_strategy: cannot be combined with select, which evaluates every 2 steps (select.every); leave",
    ),
    "Trainer's own option": (
        ["train={load_best_model_at_end: true}"],
        "train.load_best_model_at_end: cannot be set here: use the stage's 'select'",
    ),
    "a key of tasks": (
        ["data.eval=./items.jsonl", "select={metric: eval_loss, every: 2, limit: 5}"],
        "select.limit: has no effect without select.task",
    ),
    "no data file": (
        ["select={metric: acc, every: 2, task: sums, data: {test: ./items.txt}}"],
        "select.data.test: './items.txt' should be a file ending in .jsonl",
    ),
    "several processes": (
        ["select={metric: acc, every: 2, task: sums}", "launch={num_processes: 2}"],
        "select.task: scores points in one process",
    ),
    "the same file": (
        ["select={metric: acc, every: 2, task: other, data: {test: ./copy.jsonl}}"],
        "select.data.test: select chooses by these items, and stages.bench.tasks.0.data.test reports a score on them,"
        " which would be inflated; name other items",
    ),
    "the same task": (
        ["select={metric: acc, every: 2, task: arc_easy}", "bench.tasks=[{task: hellaswag}, {task: arc_easy}]"],
        "select.task: select chooses by these items, and stages.bench.tasks.1.task reports",
    ),
    "prompts of a sensitivity stage": (
        ["data.eval=./prompts.jsonl", "select={metric: eval_loss, every: 2}"],
        "data.eval: select chooses by these items, and stages.wording.prompts.0.data reports",
    ),
}


def plan(overrides: list[str]) -> int:
    """The exit code of `run-recipe --plan`; an override without a stage is one of wit."""
    settings = [f"stages.{each}" if each.startswith("bench") else f"stages.wit.{each}" for each in overrides]
    options = [option for each in settings for option in ("--set", each)]
    return cli.main(["r.yaml", "--plan", *options])


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with RECIPE and its files, the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(yaml.safe_dump(CHOICE | {"task": "sums"}))
    for name in ("rows", "items", "copy", "prompts"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name[0], "completion": "b"}) + "\n")
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "items.jsonl").read_bytes())
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.usefixtures("recipe")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_chosen_by_is_refused(capsys: pytest.CaptureFixture[str], case: str) -> None:
    overrides, message = REFUSED[case]
    assert plan(overrides) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("recipe")
def test_other_items_of_a_task_that_is_reported_are_allowed() -> None:
    same_task = ["select={metric: acc, every: 2, task: arc_easy, split: validation}", "bench.tasks=[{task: arc_easy}]"]
    assert plan(same_task) == 0
    assert plan(["data.eval=./items.jsonl"]) == 0, "nothing is chosen by it"


@pytest.mark.long
def test_a_group_that_is_reported_has_the_task(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": str(recipe / "items.jsonl")}}
    task = CHOICE | data | {"test_split": "train", "fewshot_split": None, "doc_to_text": "{{question}}"}
    (recipe / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (recipe / "prompts.jsonl").write_text('{"id": "a", "prompts": ["a", "b"]}\n')
    for name in ("sums", "other"):
        (recipe / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name}))
    (recipe / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "all_sums", "task": ["sums", "other"]}))
    select = "select={metric: acc, every: 2, task: sums, include_path: ./tasks}"
    bench = "stages.bench.tasks=[{task: all_sums}]"
    assert cli.main(["r.yaml", "--check", "--set", f"stages.wit.{select}", "--set", bench]) == 2
    error = "stages.wit.select.task: select chooses by items of sums, and stages.bench reports a score on them"
    assert error in capsys.readouterr().err


def test_a_training_shorter_than_the_interval_is_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match="is 10, but the training has 10 steps, so its last step is the only point"):
        train(tmp_path / "it", model_folder, "sft", SFT, select={"metric": "eval_loss", "every": 10})


@pytest.mark.parametrize(("lora", "ends_at"), [(None, (3, 10)), (LORA, ())], ids=["full", "LoRA"])
def test_the_model_with_the_highest_score_is_published(
    tmp_path: Path,
    model_folder: Path,
    task: dict[str, Any],
    lora: dict[str, Any] | None,
    ends_at: tuple[int, ...],
) -> None:
    """Scoring changes neither the training nor the published tokenizer and config."""
    changes = {"select": task | ({"every": 5} if lora else {}), "lora": lora, "data": {"train": "t"}}
    metrics, published = train(tmp_path / "select", model_folder, "sft", SFT, **changes)
    points = {point["step"]: point["eval_sums/acc"] for point in metrics.to_json()["points"]}
    ends = {
        n: train(tmp_path / f"{n}", model_folder, "sft", SFT, lora=lora, train={"max_steps": n})[1] for n in ends_at
    }
    assert list(points) == ([5, 10] if lora else [3, 6, 9, 10])
    assert {n: points[n] for n in ends} == {n: accuracy(folder) for n, folder in ends.items()}
    best = max(points, key=lambda step: points[step])
    assert best < 10, "the last point is not the best, or the test would show nothing"
    assert metrics.to_json()["selected_step"] == best
    losses = {
        folder: [row for row in map(json.loads, (folder / "training_log.jsonl").open()) if "loss" in row]
        for folder in (published, *ends.values())
    }
    assert [row["step"] for row in losses[published]] == [5, 10]
    assert not ends or losses[published] == losses[ends[10]], "scoring does not change what is logged of training"
    assert accuracy(published) == points[best]
    if best in ends:
        assert weights(published) == weights(ends[best])
        for name in ("generation_config.json", "tokenizer.json", "config.json"):
            assert (published / name).read_bytes() == (ends[best] / name).read_bytes()


def test_an_interrupted_training_chooses_the_same(tmp_path: Path, model_folder: Path, task: dict[str, Any]) -> None:
    def interrupt(done: int, *_: Any) -> None:
        if done == 8:
            raise KeyboardInterrupt

    changes = {"select": task | {"every": 6}, "data": {"train": "t"}, "train": {"save_steps": 4}}
    metrics, published = train(tmp_path / "select", model_folder, "sft", SFT, **changes)
    context = context_of(tmp_path / "again", model_folder, "sft", SFT, **changes)
    with pytest.raises(KeyboardInterrupt):
        KINDS["sft"].load("run")(replace(context, progress=interrupt))
    again, resumed = train(tmp_path / "again", model_folder, "sft", SFT, **changes)
    assert again.notes[0].startswith("resumed from step ")
    assert again.to_json()["points"] == metrics.to_json()["points"]
    assert weights(resumed) == weights(published)
    assert (resumed / "training_log.jsonl").read_bytes() == (published / "training_log.jsonl").read_bytes()
