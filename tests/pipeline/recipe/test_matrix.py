"""The matrix of a recipe: cells, shared steps, names, and errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.plan.cache import Decisions, decide
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan
from pipeline.recipe.loader import load
from pipeline.store.store import Store
from stages.records.manifest import Manifest
from stages.records.metrics import Metrics

GRID = """\
name: grid
model: ./model
matrix:
  prompt: [0, 0.2]
  completion: [0, 1.0]
  exclude: [{prompt: 0, completion: 0}]
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: "${matrix.prompt}", completion: "${matrix.completion}"}
    train: &train {max_steps: 1}
  dpo:
    kind: dpo
    model: wit
    data: {train: ./pairs.jsonl}
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: *train
  bench:
    kind: lm_eval
    models: [base, it, dpo]
    tasks: [{task: arc_easy}]
  report: {kind: report}
"""
CELLS = ["prompt=0,completion=1", "prompt=0.2,completion=0", "prompt=0.2,completion=1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the grid and the files it refers to."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a ", "completion": "b"}\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "a ", "completion": "c"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a ", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "r.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*overrides: str, cells: tuple[str, ...] = ()) -> Plan:
    return build_plan(load(Path("r.yaml"), overrides, cells), Resolver(Path("runs"), print))


def decisions(*overrides: str) -> Decisions:
    resolver = Resolver(Path("runs"), print)
    return decide(build_plan(load(Path("r.yaml"), overrides), resolver), Store(Path("store")), resolver)


def fingerprints(*overrides: str) -> dict[str, str]:
    return {step: str(decision.fingerprint) for step, decision in decisions(*overrides).items()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error message of a plan."""
    assert main(["r.yaml", "--plan", *arguments]) == 2
    return capsys.readouterr().err


def test_cells_share_equal_steps(folder: Path) -> None:
    cell_steps = [f"{name}{cell}]" for cell in CELLS for name in ("wit[", "dpo[", "bench[dpo,")]
    shared = ["it", "bench[base]", "bench[it]", "report"]
    steps = {step.name: step for step in plan().steps}
    assert sorted(steps) == sorted(cell_steps + shared)
    for cell in CELLS:
        assert [source.name for source in steps[f"dpo[{cell}]"].dependencies] == [f"wit[{cell}]"]
        assert [source.name for source in steps[f"bench[dpo,{cell}]"].dependencies] == [f"dpo[{cell}]"]
    weights = {name: step.config.model_dump()["weights"] for name, step in steps.items() if name.startswith("wit")}
    assert [(w["prompt"], w["completion"]) for w in weights.values()] == [(0, 1), (0.2, 0), (0.2, 1)]
    benches = {name for name in steps if name.startswith("bench")}
    assert {source.name for source in steps["report"].dependencies} == benches


def test_every_step_comes_after_its_needs(folder: Path) -> None:
    grid_plan = plan()
    for index, step in enumerate(grid_plan.steps):
        assert all(source in grid_plan.steps[:index] for source in step.dependencies)


def test_a_cell_is_its_content(folder: Path) -> None:
    """The same weights have the same fingerprint without a matrix; adding or removing cells changes no other cell."""
    before = fingerprints()
    assert before["it"] == before["wit[prompt=0,completion=1]"]
    wider = fingerprints("matrix.prompt=[0.6,0,0.2]")
    assert set(before) < set(wider)
    assert {name for name in before if before[name] != wider[name]} == {"report"}
    written = fingerprints("stages.wit.weights={prompt: 0.2, completion: 1}")
    assert written["wit"] == before["wit[prompt=0.2,completion=1]"]


def test_include_exclude_and_names(folder: Path) -> None:
    named = [
        "matrix={prompt: [0, 0.5], data: {one: ./rows.jsonl, two: ./other.jsonl}}",
        "matrix.include=[{prompt: 0.10, data: two}]",
        "matrix.exclude=[{data: one}, {prompt: 0.50, data: two}]",
        "stages.wit.data.train=${matrix.data}",
        "stages.wit.weights.completion=1",
    ]
    (folder / "r.yaml").write_text(GRID.replace("  completion: [0, 1.0]\n", ""))
    names = [step.name for step in plan(*named).steps if step.stage == "wit"]
    assert names == ["wit[prompt=0,data=two]", "wit[prompt=0.1,data=two]"]


def test_a_seed_of_the_recipe_on_an_axis(folder: Path) -> None:
    """Stages that use the recipe's seed depend on it; stages with a seed of their own, or without one, do not."""
    (folder / "r.yaml").write_text(GRID.replace("matrix:\n", "seed: ${matrix.seed}\nmatrix:\n  seed: [1, 2]\n"))
    overrides = ("stages.it.seed=7", "stages.bench.seed=7", "stages.wit.weights={prompt: 0, completion: 1}")
    steps = {step.name: step for step in plan(*overrides).steps}
    assert sorted(steps) == sorted(
        ["it", "bench[base]", "bench[it]", "report"]
        + [f"{name}seed={seed}]" for name in ("wit[", "dpo[", "bench[dpo,") for seed in (1, 2)]
    )
    assert steps["wit[seed=2]"].config.model_dump()["seed"] == 2


def test_a_model_on_an_axis(folder: Path) -> None:
    (folder / "r.yaml").write_text(GRID.replace("model: ./model\n", "model: ${matrix.model}\n"))
    names = {step.name for step in plan("matrix={model: {a: ./model, b: ./model}, prompt: [0], completion: [1]}").steps}
    assert "bench[base,model=a]" in names
    assert "wit[prompt=0,completion=1,model=b]" in names
    assert "it[model=a]" in names


def test_reports_by_an_axis(folder: Path) -> None:
    """A report that uses an axis has one step per value, over the matching steps."""
    (folder / "r.yaml").write_text(GRID.replace("{kind: report}", "{kind: report, title: 'p${matrix.prompt}'}"))
    reports = {
        step.name: [source.name for source in step.dependencies] for step in plan().steps if step.stage == "report"
    }
    assert reports == {
        "report[prompt=0]": ["bench[base]", "bench[it]", "bench[dpo,prompt=0,completion=1]"],
        "report[prompt=0.2]": ["bench[base]", "bench[it]", *(f"bench[dpo,prompt=0.2,completion={c}]" for c in (0, 1))],
    }


def test_cells_on_the_command_line(folder: Path) -> None:
    def chosen(*cells: str) -> list[str]:
        return [step.name[4:-1] for step in plan(cells=cells).steps if step.stage == "wit"]

    assert chosen("prompt=0.20") == CELLS[1:]
    assert chosen("prompt=0.2, completion=1") == CELLS[2:]
    assert chosen("completion=0", "prompt=0") == CELLS[:2]


WRONG = {
    "no mapping": (["matrix=3"], "matrix: must be a mapping of axes to their values"),
    "no list": (["matrix.prompt=3"], "matrix.prompt: must be a list of values"),
    "no value": (
        ["matrix.prompt=[]"],
        "matrix.prompt: must be a list of values, or a mapping of names to values, with at",
    ),
    "twice": (["matrix.prompt=[0.2, 0.20]"], "matrix.prompt.1: is listed twice: 0.2"),
    "bad axis": (["matrix.a-b=[1]"], "matrix.a-b: is not a valid name of an axis"),
    "unnamed section": (["matrix.prompt=[{a: 1}]"], "matrix.prompt.0: needs a short name"),
    "bad name": (["matrix.prompt={'a,b': 1}"], "matrix.prompt.a,b: 'a,b' is not a valid name"),
    "unknown axis": (["matrix.exclude=[{promt: 0}]"], "matrix.exclude.0.promt: is no axis; did you mean 'prompt'?"),
    "no partial": (["matrix.exclude=[0]"], "matrix.exclude.0: must be a mapping of axes to values"),
    "no list of partials": (["matrix.exclude=3"], "matrix.exclude: must be a list of mappings"),
    "all excluded": (["matrix.exclude=[{prompt: 0}, {prompt: 0.2}]"], "matrix.exclude: leaves no cell"),
    "half a cell": (["matrix.include=[{prompt: 0.5}]"], "matrix.include.0: does not set completion"),
    "too many": ([f"matrix.a{n}=[0,1,2,3,4,5,6,7,8,9]" for n in range(6)], "matrix: has 4,000,000 cells"),
    "unknown reference": (
        ["stages.wit.weights.prompt=${matrix.promt}"],
        "stages.wit.weights.prompt: '${matrix.promt}' names no axis of the matrix; did you mean 'prompt'?",
    ),
    "the whole": (
        ["stages.wit.weights=${matrix}"],
        "'${matrix}' names no axis of the matrix; it has prompt, completion",
    ),
    "in itself": (["matrix.prompt=['${matrix.completion}']"], "'${matrix.completion}' is inside the matrix"),
    "name by cell": (["name=a${matrix.prompt}"], "name: is not the same for all cells"),
    "bad value": (["matrix.prompt=[-7]"], "stages.wit.weights.prompt: should be greater than or equal to 0, found -7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_matrix_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    overrides, expected = WRONG[case]
    output = refused(capsys, *itertools.chain(*(("--set", override) for override in overrides)))
    assert expected in output
    assert not (folder / "runs").exists()


def test_other_errors_are_reported_with_those_of_the_matrix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = refused(capsys, "--set", "matrix.prompt=3", "--set", "stages.wit.kid=x", "--set", "stages.dpo.model=wot")
    assert {line.split(": ")[2] for line in output.splitlines()} == {
        "matrix.prompt",
        "stages.wit.kid",
        "stages.dpo.model",
    }


def test_a_matrix_without_an_axis(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, stages = GRID[: GRID.index("  prompt:")], GRID[GRID.index("stages:") :]
    (folder / "r.yaml").write_text(head + "  exclude: []\n" + stages)
    assert "r.yaml:3:1: matrix: has no axis" in refused(capsys)


def test_an_error_in_all_cells_is_reported_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "r.yaml").write_text(GRID.replace("max_steps", "maxsteps").replace("./pairs", "./pears"))
    output = refused(capsys).splitlines()
    assert [line.split(": ")[2] for line in output] == ["stages.wit.train.maxsteps", "stages.dpo.data.train"]


CELLS_WRONG = {
    "promt=0.2": "'promt' is no axis of the matrix; did you mean 'prompt'?; it has prompt, completion",
    "prompt=0.3": "--cells prompt=0.3: prompt is never '0.3'; it is 0, 0.2",
    "prompt": "write AXIS=VALUE",
    "prompt=0,completion=0": "--cells prompt=0,completion=0: the matrix has no such cell",
}


@pytest.mark.parametrize("cells", CELLS_WRONG)
def test_unknown_cells(folder: Path, capsys: pytest.CaptureFixture[str], cells: str) -> None:
    assert CELLS_WRONG[cells] in refused(capsys, "--cells", cells)


def test_cells_of_a_recipe_without_a_matrix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "r.yaml").write_text(GRID.replace(GRID[GRID.index("matrix:") : GRID.index("stages:")], ""))
    assert "--cells prompt=0: the recipe has no matrix" in refused(
        capsys, "--cells", "prompt=0", "--set", "stages.wit.weights={prompt: 0, completion: 1}"
    )


def test_the_plan_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.yaml", "--plan", "--json", "--cells", "prompt=0"]) == 0
    steps: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["steps"]
    assert next(step for step in steps if step["step"] == "bench[dpo,prompt=0,completion=1]")["needs"] == [
        "dpo[prompt=0,completion=1]"
    ]


def test_a_benchmark_depends_on_the_version_of_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's version defines a task; no other stage depends on it."""
    before, steps = fingerprints(), {step.name: step for step in plan().steps}
    old = next(step for step in steps.values() if step.stage == "bench")
    manifest = Manifest(
        step=old.name,
        kind=old.kind,
        recipe=old.recipe.name,
        version=old.config.version,
        fingerprint="0" * 32,
        config=old.config.model_dump(),
        inputs={},
        metrics=Metrics(),
        environment={"packages": {"lm_eval": "0.4.1", "torch": "1"}},
        started="",
        seconds=1.0,
        outputs={},
    )
    (folder / "out").mkdir()
    Store(Path("store")).publish(folder / "out", manifest)
    assert "lm_eval 0.4.1 -> 0.4.13" in decisions()[old.name].reason
    monkeypatch.setattr("pipeline.plan.cache.installed_version", lambda name: "9.9" if name == "lm_eval" else "1")
    after = fingerprints()
    changed = {steps[name].stage for name in before if before[name] != after[name]}
    assert changed == {"bench", "report"}
