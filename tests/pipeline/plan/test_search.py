"""A search through the command: short trainings first, the better ones of them in full, and only these benchmarked."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from pipeline.plan.search import rank, search_cost
from pipeline.recipe.loader import Halving
from stages.sft.config import SFTStage
from stages.training.config import DEFAULT_EPOCHS
from tests.pipeline.run.test_command import command, plan, states, to_run, write_world

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
matrix: {rate: [1.0e-5, 1.0e+30, 1.0e-2, 1.0e-3]}
search: {stage: wit, factor: 2, rungs: 2}
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl, eval: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 1}
    train: {max_steps: 6, per_device_train_batch_size: 2, learning_rate: "${matrix.rate}", warmup_steps: 2}
  bench:
    kind: lm_eval
    models: [wit]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  report: {kind: report}
"""
"""At a learning rate of 1e30 the training diverges, which fails its step."""
SHORT = {rate: f"wit[rate={rate},search=1/2]" for rate in ("1e-05", "1e+30", "0.01", "0.001")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder in which the search ran once."""
    folder = tmp_path_factory.mktemp("search")
    write_world(folder, model_folder)
    (folder / "r.yaml").write_text(RECIPE)
    done = command(folder)
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 1, done.stdout + done.stderr  # for one candidate failed
    return folder


def completion_loss(world: Path, step: str) -> float:
    """Of a step, off the trainer's own log."""
    run = json.loads((world / "runs/small/run.json").read_text())
    (path,) = [entry["path"] for entry in run["steps"] if entry["step"] == step]
    log = [json.loads(line) for line in (world / "runs" / path / "training_log.jsonl").read_text().splitlines()]
    return next(row["eval_completion_loss"] for row in reversed(log) if "eval_completion_loss" in row)


def steps_trained(world: Path, step: str) -> int:
    return json.loads((world / "runs/small" / step.replace("/", "_") / "stage.json").read_text())["metrics"]["steps"]


def test_the_better_half_trains_in_full_and_is_benchmarked(world: Path) -> None:
    losses = {rate: completion_loss(world, SHORT[rate]) for rate in ("1e-05", "0.01", "0.001")}
    better = sorted(losses, key=lambda rate: losses[rate])[:2]
    whole = {f"{kind}[{model}rate={rate}]" for rate in better for kind, model in (("wit", ""), ("bench", "wit,"))}
    ended = states(world)
    assert {name for name, state in ended.items() if state == "done"} == whole | {"report"}
    assert {name for name, state in ended.items() if state == "cached"} == {SHORT[rate] for rate in losses}
    assert SHORT["1e+30"] not in ended  # it failed on the first rung and was left behind
    assert {steps_trained(world, SHORT[rate]) for rate in losses} == {3}
    assert {steps_trained(world, f"wit[rate={rate}]") for rate in better} == {6}


def test_what_was_chosen_is_told_and_kept(world: Path) -> None:
    said = (world / "said.txt").read_text()
    assert f"1 failed: {SHORT['1e+30']}" in said
    assert "search: rung 1 of 2: 4 trainings of wit at 1/2 of the training, by eval_completion_loss (lowest)" in said
    with (world / "runs/small/search.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if row["length"] == "1/2"]
    assert {row["step"] for row in first} == set(SHORT.values())
    for row in first:
        loss = "failed" if "1e+30" in row["step"] else repr(completion_loss(world, row["step"]))
        assert row["eval_completion_loss"] == loss
    last = [row for row in rows if row["length"] == "1"]
    best = min(last, key=lambda row: float(row["eval_completion_loss"]))["step"]
    assert [row["step"] for row in last if row["kept"] == "yes"] == [best]
    assert f"search: {best} is best by eval_completion_loss" in said


def test_nothing_that_was_made_runs_again(world: Path) -> None:
    """What failed is tried again; without it the whole search is there, and a further candidate runs alone."""
    assert to_run(world) == {SHORT["1e+30"]}
    without = ["--set", "matrix.rate=[1.0e-5, 1.0e-2, 1.0e-3]"]
    assert set(plan(world, *without)) >= {"report"}
    assert to_run(world, *without) == set()
    assert to_run(world, "--set", "matrix.rate=[1.0e-5, 1.0e-2, 1.0e-3, 1.0e-4]") == {"wit[rate=0.0001,search=1/2]"}
    assert to_run(world, *without, "--from", "bench") == {step for step in plan(world, *without) if "bench" in step} | {
        "report"
    }


def test_a_step_of_any_rung_can_be_named(world: Path) -> None:
    without = ["--set", "matrix.rate=[1.0e-5, 1.0e-2, 1.0e-3]"]
    (whole,) = [step for step in plan(world, *without) if step.startswith("bench")][:1]
    assert to_run(world, *without, "--stage", whole) == {whole}
    assert to_run(world, *without, "--stage", SHORT["0.01"]) == {SHORT["0.01"]}
    trained = whole.replace("bench[wit,", "wit[")
    assert to_run(world, *without, "--from", trained) == {trained, whole, "report"}
    done = command(world, *without, "--plan", "--force", "bench[rate=1]")
    assert done.returncode == 2
    assert "--force bench[rate=1]: the recipe has no such stage" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--plan"]])
def test_a_later_stage_cannot_run_before_it_is_chosen_what_on(world: Path, arguments: list[str]) -> None:
    done = command(world, "--stage", "bench", "--set", "matrix.rate=[3.0e-3, 1.0e-2]", *arguments)
    assert done.returncode == 2
    assert "wit[rate=0.003,search=1/2] has no result, and the search needs it to choose" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.stage=wti", "search.stage: 'wti' is no stage of this recipe; did you mean 'wit'?"),
        ("search.stage=bench", "search.stage: 'bench' is of kind lm_eval, whose training cannot be shortened"),
        ("search.metric=eval_loss", "search.metric: 'eval_loss' is nothing to compare cells by"),
        ("search.over=[rat]", "search.over.0: 'rat' is no axis of the matrix; did you mean 'rate'?"),
        ("search.rungs=1", "search.rungs: "),
        ("search.facto=3", "search.facto: unknown key; did you mean 'factor'?"),
        ("stages.wit.data.eval=null", "add stages.wit.data.eval"),
        ("matrix=null", "search: chooses among the cells of a matrix"),
        ("matrix.search=[1, 2]", "matrix.search: is the name that a search uses"),
    ],
)
def test_a_wrong_search_is_told_before_anything_runs(world: Path, change: str, said: str) -> None:
    done = command(world, "--plan", "--set", change)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr


def test_an_axis_that_changes_nothing_in_training_is_told(world: Path) -> None:
    done = command(world, "--plan", "--set", "matrix.items=[1, 2]", "--set", "search.over=[items]")
    assert done.returncode == 2, done.stdout
    assert "search.over.0: 'items' changes nothing in the training of wit; leave it out" in done.stderr


def test_seeds_are_searched_one_by_one(world: Path) -> None:
    """Each value of an axis that is not searched over has candidates of its own; what is planned first is all."""
    grid = ["--set", "matrix.seed=[1, 2]", "--set", "stages.wit.seed=${matrix.seed}", "--set", "search.over=[rate]"]
    steps = set(plan(world, *grid))
    assert steps == {f"wit[rate={rate},seed={seed},search=1/2]" for rate in SHORT for seed in (1, 2)}


def test_the_numbers_by_hand() -> None:
    """35 candidates: 35 at 1/16, ceil(35 / 4) = 9 at 1/4, ceil(9 / 4) = 3 in full: 35/16 + 9/4 + 3 trainings."""
    halving = Halving(stage="wit")
    assert halving.lengths == [Fraction(1, 16), Fraction(1, 4), Fraction(1)]
    assert (halving.survivors(35), halving.survivors(9), halving.survivors(1)) == (9, 3, 1)
    assert search_cost(35, halving) == Fraction(119, 16)
    assert rank({"a": 2.0, "b": 1.0, "c": 2.0}, "lowest") == ["b", "a", "c"]
    assert rank({"a": 2.0, "b": 1.0, "c": 2.0}, "highest") == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("train", "short"),
    [
        ({"num_train_epochs": 4, "warmup_steps": 20}, {"num_train_epochs": 0.25, "warmup_steps": 1.0}),
        ({"num_train_epochs": 4, "warmup_steps": 64}, {"num_train_epochs": 0.25, "warmup_steps": 4.0}),
        ({"max_steps": 100, "num_train_epochs": 4}, {"max_steps": 6, "num_train_epochs": 4}),
        ({"max_steps": 3, "warmup_steps": 0.1}, {"max_steps": 1, "warmup_steps": 0.1}),
        ({}, {"num_train_epochs": 3 / 16}),
    ],
)
def test_the_schedule_is_compressed_not_cut(train: dict[str, Any], short: dict[str, Any]) -> None:
    stage = SFTStage.model_validate({"data": {"train": "x"}, "weights": {"prompt": 0, "completion": 1}, "train": train})
    assert stage.shortened(Fraction(1, 16)).train.model_dump() == short


def test_the_library_trains_for_as_many_epochs_by_default(tmp_path: Path) -> None:
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=True)
    assert config.num_train_epochs == DEFAULT_EPOCHS
