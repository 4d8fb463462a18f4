"""`run-recipe --preview` before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.run.test_command import command

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
stages:
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_length: 8}
  wit:
    kind: sft
    model: it
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
  dpo:
    kind: dpo
    model: wit
    data: {train: ./rows.jsonl, rejected: other_row}
  bench:
    kind: lm_eval
    models: [wit]
    tasks: [{task: mmlu}]
"""
ROWS = [("Sky? ", "blue"), ("Grass? ", "green"), ("Snow? ", "<script>"), ("Coal? ", "black")]


@pytest.fixture
def world(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with a recipe that has not run."""
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE)
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def previewed(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The stages in the output of `--preview 2 --json`."""
    done = command(folder, "--preview", "2", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["stages"]


def written(folder: Path) -> set[str]:
    """The files below runs/, without the cache."""
    runs = folder / "runs"
    files = {str(file.relative_to(runs)) for file in runs.rglob("*") if file.is_file()}
    return {file for file in files if not file.startswith("cache/")}


def test_every_token_with_its_weight(world: Path) -> None:
    """Rows 1 and 3 of 4; `wit` starts from a model that is not trained yet. Sky? blue<end> is 5 + 4 + 1 tokens."""
    it, wit, dpo = previewed(world)
    assert [(stage["step"], stage["rows"], stage["file"]) for stage in (it, wit)] == [
        ("it", 4, "rows.jsonl"),
        ("wit", 4, "rows.jsonl"),
    ]
    assert [example["row"] for example in wit["examples"]] == [1, 3]
    first = wit["examples"][0]
    assert [token["text"] for token in first["tokens"]] == [*"Sky? blue", "<end>"]
    assert [token["weight"] for token in first["tokens"]] == [0] + [0.2] * 4 + [0.8] * 5
    assert [token["segment"] for token in first["tokens"]] == ["prompt"] * 5 + ["completion"] * 5
    assert (first["weighing"], first["cut"], first["merged"]) == ({"prompt": 4, "completion": 5}, 0, 0)
    assert it["weights"] == {"prompt": 0, "completion": 1}
    truncated = it["examples"][0]
    assert [token["weight"] for token in truncated["tokens"]] == [0] * 5 + [1] * 3
    assert truncated["cut"] == 2
    pair = dpo["examples"][0]
    assert [token["text"] for token in pair["tokens"] if token["segment"] == "chosen"] == [*"blue", "<end>"]
    assert pair["weighing"].keys() == {"chosen", "rejected"}
    assert written(world) == {f"small/preview/{name}.html" for name in ("it", "wit", "dpo")}
    page = (world / wit["page"]).read_text()
    assert page.count('title="') == 10 + 15
    assert "<script" not in page


def test_on_a_pipe(world: Path) -> None:
    done = command(world, "--preview", "1", "--stage", "wit", "--set", "stages.wit.weights.prompt=0.5")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "[prompt ×0.5] k¦y¦?¦·" in done.stdout  # noqa: RUF001
    assert "[completion ×0.8] b¦l¦u¦e¦⟦<end>⟧" in done.stdout  # noqa: RUF001
    assert "page: runs/small/preview/wit.html" in done.stdout
    assert written(world) == {"small/preview/wit.html"}


def test_more_rows_than_the_file_has(world: Path) -> None:
    done = command(world, "--preview", "9", "--json", "--stage", "wit", "--runs", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert [example["row"] for example in json.loads(done.stdout)["stages"][0]["examples"]] == [1, 2, 3, 4]
    assert (world / "elsewhere" / "small" / "preview" / "wit.html").is_file()
    assert not (world / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preview", "0"], "must be 1 or more"),
        (["--preview", "1", "--plan"], "not allowed with argument"),
        (["--preview", "1", "--stage", "bench"], "shows stages of kind sft or dpo, and none of those is chosen"),
        (["--preview", "1", "--stage", "wti"], "did you mean 'wit'?"),
        (["--preview", "1", "--set", "stages.wit.data.train=./none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_wrong_calls(world: Path, arguments: list[str], expected: str) -> None:
    done = command(world, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (world / "runs").exists()


def test_a_bad_row(world: Path) -> None:
    """Reported as a run would report it, although it is not among the shown rows."""
    with (world / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "Sea? "}\n')
    done = command(world, "--preview", "1")
    assert done.returncode == 2
    assert "rows.jsonl:5: column 'completion' is missing" in done.stderr


def test_a_recipe_without_training(world: Path) -> None:
    recipe = "name: small\nmodel: ./model\nstages:\n  mmlu:\n    kind: lm_eval\n"
    (world / "r.yaml").write_text(recipe + "    models: [base]\n    tasks: [{task: mmlu}]\n")
    done = command(world, "--preview", "1")
    assert done.returncode == 2
    assert "r.yaml:3:1: stages: has no stage of kind sft or dpo" in done.stderr


def test_a_model_without_a_tokenizer(world: Path) -> None:
    """Detected in the worker process, and reported like any error of the recipe."""
    (world / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (world / "bare" / name).write_bytes((world / "model" / name).read_bytes())
    done = command(world, "--preview", "1", "--stage", "it", "--set", "model=./bare")
    assert done.returncode == 2
    assert "bare: holds no tokenizer that can be loaded" in done.stderr
    assert "Traceback" not in done.stderr
