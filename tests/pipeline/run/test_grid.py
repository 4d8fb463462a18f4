"""A grid through the command: real steps side by side, some of which fail, and what another terminal sees of it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import cli
from pipeline.run.local_executor import LocalExecutor
from tests.pipeline.run.test_command import command, environment, plan, to_run, write_world

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
matrix:
  prompt: [0, 0.2]
  rate: {usual: 1.0e-3, wild: 1.0e+30}
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: "${matrix.prompt}", completion: 1}
    train: {max_steps: 60, per_device_train_batch_size: 2, learning_rate: "${matrix.rate}", logging_steps: 1}
  bench:
    kind: lm_eval
    models: [base, wit]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  report: {kind: report}
"""
"""The trainings of the cells `rate=wild` diverge."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder in which the grid ran once, while `--status` looked on."""
    folder = tmp_path_factory.mktemp("grid")
    write_world(folder, model_folder)
    (folder / "r.yaml").write_text(RECIPE)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml"]
    with subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        looks: list[dict[str, Any]] = []
        pinned: list[dict[int, list[int]]] = []
        while process.poll() is None:
            pinned.append(cores_of_workers(process.pid))
            looks += status(folder)
            time.sleep(0.2)
        assert process.stdout is not None
        (folder / "said.txt").write_text(process.stdout.read())
        (folder / "looks.json").write_text(json.dumps(looks))
        (folder / "pinned.json").write_text(json.dumps(pinned))
        assert process.returncode == 1
    return folder


def status(folder: Path) -> list[dict[str, Any]]:
    """What --status --json prints, in this process: another would start too slowly to see all states of a short run."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        return [json.loads(printed.getvalue())] if cli.main(["r.yaml", "--status", "--json"]) == 0 else []


def cores_of_workers(pid: int) -> dict[int, list[int]]:
    """The cores that each step's worker may use, by its process, once it is at work."""
    values = {}
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "pipeline.run.worker" in child.cmdline() and child.num_threads() > 1 and child.cpu_times().user > 0.1:
                values[child.pid] = child.cpu_affinity()
    return values


def outcome(folder: Path) -> dict[str, set[str]]:
    """State -> the steps that ended so."""
    values: dict[str, set[str]] = {}
    for step in json.loads((folder / "runs/small/run.json").read_text())["steps"]:
        values.setdefault(step["state"], set()).add(step["step"])
    return values


def test_a_failed_cell_stops_no_other(world: Path) -> None:
    assert outcome(world) == {
        "done": {
            *("wit[prompt=0,rate=usual]", "wit[prompt=0.2,rate=usual]", "bench[base]"),
            *("bench[wit,prompt=0,rate=usual]", "bench[wit,prompt=0.2,rate=usual]"),
        },
        "failed": {"wit[prompt=0,rate=wild]", "wit[prompt=0.2,rate=wild]"},
        "skipped": {"bench[wit,prompt=0,rate=wild]", "bench[wit,prompt=0.2,rate=wild]", "report"},
    }
    said = (world / "said.txt").read_text()
    assert re.search(r"2 failed: wit\[prompt=0,rate=wild\], wit\[prompt=0\.2,rate=wild\]; 3 more need them", said), said
    assert len(re.findall(r"^    log: .*/logs/wit\[prompt=0(\.2)?,rate=wild\]\.txt$", said, re.MULTILINE)) == 1
    assert said.endswith("to continue with the steps that have no result:\n  run-recipe r.yaml\n")


def test_another_terminal_sees_how_far_it_is(world: Path) -> None:
    looks = json.loads((world / "looks.json").read_text())
    assert {look["status"] for look in looks} >= {"running"}
    running = [step for look in looks for step in look["steps"] if step["state"] == "running"]
    assert any(step["progress"] and step["progress"][1] == 60 for step in running if step["kind"] == "sft")
    done = [sum(step["state"] == "done" for step in look["steps"]) for look in looks]
    assert done == sorted(done)
    assert len(set(done)) > 2
    said = command(world, "--status")
    assert said.returncode == 0
    assert re.search(r"small: failed, as of .*\n  5 of 10 steps done, 2 failed, 3 skipped\n", said.stdout), said.stdout
    assert "failed wit[prompt=0,rate=wild]: " in said.stdout


def test_each_worker_keeps_to_its_share_of_the_cores(world: Path) -> None:
    executor = LocalExecutor()
    looks = [list(look.values()) for look in json.loads((world / "pinned.json").read_text())]
    assert max(map(len, looks)) == executor.jobs
    for cores in looks:
        assert all(len(share) == executor.threads for share in cores)
        assert len({core for share in cores for core in share}) == sum(map(len, cores))


def test_cells_that_went_well_make_a_report(world: Path) -> None:
    """What is there is not made again, whatever cells are chosen or come along."""
    chosen = ["--cells", "rate=usual"]
    assert to_run(world, *chosen) == {"report"}
    done = command(world, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    with (world / "runs/small/report/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["prompt_weight"], row["completion_weight"]) for row in rows} == {
        ("base", "", ""),
        ("wit[prompt=0,rate=usual]", "0.0", "1.0"),
        ("wit[prompt=0.2,rate=usual]", "0.2", "1.0"),
    }
    more = to_run(world, *chosen, "--set", "matrix.prompt=[0.4, 0.2, 0]")
    assert more == {"wit[prompt=0.4,rate=usual]", "bench[wit,prompt=0.4,rate=usual]", "report"}


JOINED = """\
name: joined
stages:
  report:
    kind: report
    runs: [small, {run: not-yet, model_name: M, data_name: D}]
"""


def test_a_report_joins_runs(world: Path) -> None:
    """The numbers of each run's last steps, what is missing, and a link from each number to its manifest."""
    assert command(world, "--cells", "rate=usual").returncode == 0
    recipe = (world / "r.yaml").read_text()
    (world / "r.yaml").write_text(JOINED)
    try:
        done = command(world)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nothing is measured yet of not-yet; run-recipe makes it" in done.stdout
        assert "1 of 2 runs lack results" in done.stdout
        with (world / "runs/joined/report/results.csv").open() as file:
            values = {(row["recipe"], row["model"]): float(row["value"]) for row in csv.DictReader(file)}
        assert set(values) == {
            ("small", name) for name in ("base", "wit[prompt=0,rate=usual]", "wit[prompt=0.2,rate=usual]")
        }
        page = (world / "runs/joined/report/report.md").read_text()
        assert re.search(
            r"Where the numbers of other runs come from.*\| small \| small/run.json \| r.yaml \|", page, re.DOTALL
        )
        for (_, model), value in values.items():
            step = f"bench[{model}]".replace("[wit[", "[wit,").replace("]]", "]")
            manifest = json.loads((world / "runs/small" / step / "stage.json").read_text())
            assert manifest["metrics"]["results"][0]["value"] == value
        assert command(world, "--plan").stdout.count("cached") == 1
        assert json.loads(command(world, "--plan", "--json").stdout)["steps"][0]["state"] == "cached"
        (world / "r.yaml").write_text(recipe)
        assert command(world).returncode == 1
        (world / "r.yaml").write_text(JOINED)
        assert json.loads(command(world, "--plan", "--json").stdout)["steps"][0]["state"] == "run"
        assert re.search(r"small: no result of .*rate=wild\]", command(world).stdout)
        record = world / "runs/small/run.json"
        whole = record.read_text()
        for broken, says in (
            ("{", "is not the record of a run"),
            (whole.replace('"labels"', '"l"'), "an older version"),
        ):
            record.write_text(broken)
            done = command(world)
            assert done.returncode == 2
            assert f"r.yaml:5:12: stages.report.runs.0.run: {record}: " in done.stderr
            assert says in done.stderr
        record.write_text(whole)
    finally:
        (world / "r.yaml").write_text(recipe)


def test_one_cell_of_a_stage(world: Path) -> None:
    steps = plan(world, "--stage", "wit[prompt=0.2,rate=usual]")
    assert {name: step["why"] for name, step in steps.items()} == {"wit[prompt=0.2,rate=usual]": "forced"}
    after = to_run(world, "--from", "wit[prompt=0.2,rate=usual]", "--cells", "rate=usual")
    assert after == {"wit[prompt=0.2,rate=usual]", "bench[wit,prompt=0.2,rate=usual]", "report"}


def test_the_plan_says_what_a_cell_would_change(world: Path) -> None:
    steps = plan(world, "--cells", "rate=usual", "--set", "stages.wit.weights.completion=0.5")
    assert steps["wit[prompt=0.2,rate=usual]"]["why"] == "stages.wit.weights.completion 1.0 -> 0.5"
    assert steps["bench[base]"]["state"] == "cached"


def test_status_before_any_run(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    said = command(tmp_path, "--status")
    assert said.returncode == 2
    assert "--status: runs has no record of a run of small" in said.stderr
    assert not (tmp_path / "runs").exists()
