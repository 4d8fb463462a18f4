"""What the pipeline costs beside the work: python -m benchmarks.overhead [RECIPE] [--pairs 2]

1. Runs the recipe (recipes/wit_dpo.yaml unless another is named) with the command, and its stages bare: the same
   functions on the same inputs, a process each, as many side by side, in the same order of need; no store, no hashes,
   no checkpoints, no locks. In turn, so that a slow minute of the machine hits both. Prints both and the ratio.
2. `--plan` and a second run of the recipe when everything is there: seconds, and whether torch was imported.
3. The same for a recipe of 525 trainings, each with its evaluation, and a report, in a store made up for it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.plan.cache import inputs_of, refresh
from pipeline.plan.planner import Plan, Step, make_plan
from pipeline.recipe import loader as recipes
from pipeline.run.local_executor import Job, LocalExecutor
from pipeline.store.hash_cache import HashCache
from pipeline.store.references import fetch
from pipeline.store.store import Store
from stages import KINDS
from stages.base import Context, Input
from stages.records.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
CELLS = 525
CELL = """\
  wit{number}:
    kind: sft
    data: {{train: {data}}}
    weights: {{prompt: {prompt}, completion: 0.8}}
    train: {{num_train_epochs: 1, learning_rate: 1.0e-3}}
"""
TAIL = """\
  bench:
    kind: lm_eval
    models: [base, {models}]
    include_path: {tasks}
    tasks: [{{task: pocket_knowledge, num_fewshot: 0, data: {{test: {test}}}}}]
  report: {{kind: report}}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.cli", *arguments]


def timed(call: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------ bare stages


def bare(recipe: str, folder: Path) -> float:
    """Seconds that the stages of `recipe` take by themselves."""
    plan = make_plan(recipes.load(Path(recipe)), HashCache(folder / "none"))
    executor = LocalExecutor()
    waiting, running, made = list(plan.steps), {}, set()
    slots = list(range(executor.jobs))
    began = time.perf_counter()
    while waiting or running:
        for step in [s for s in waiting if all(need.name in made for need in s.needs)]:
            if slots:
                waiting.remove(step)
                slot = slots.pop(0)
                running[step.name] = (
                    slot,
                    _start(step, folder, os.environ | executor._share([slot], Job(step.name, folder, folder))),
                )
        for name, (slot, process) in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, (folder / f"{name}.log").read_text()
                del running[name]
                made.add(name)
                slots.append(slot)
        time.sleep(0.005)
    return time.perf_counter() - began


def _start(step: Step, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job = folder / f"{step.name}.json"
    job.write_text(json.dumps(_job(step, folder)))
    log = (folder / f"{step.name}.log").open("wb")
    call = [sys.executable, "-P", "-m", "benchmarks.overhead", "--bare-step", str(job)]
    return subprocess.Popen(call, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)


def _job(step: Step, folder: Path) -> dict[str, Any]:
    inputs = {name: asdict(_input(source, folder)) for name, source in step.inputs.items()}
    return {"step": step.name, "kind": step.kind, "config": step.config.model_dump(), "inputs": inputs}


def _input(source: Any, folder: Path) -> Input:
    if not isinstance(source, Step):
        return Input(str(fetch(source, folder / "cache")), fingerprint=str(source))  # type: ignore[arg-type]
    metrics = json.loads((folder / source.name / "metrics.json").read_text())
    nested = {name: _input(inner, folder) for name, inner in source.inputs.items()}
    config = source.config.model_dump()
    out = str(folder / source.name / "out")
    return Input(out, source.name, source.kind, source.name, config, metrics, nested)  # type: ignore[arg-type]


def bare_step(job_file: Path) -> None:
    """One stage, in the process that was started for it."""
    job = json.loads(job_file.read_text())
    stage = KINDS[job["kind"]]
    own = job_file.parent / job["step"]
    for name in ("out", "scratch", "checkpoints"):
        (own / name).mkdir(parents=True)
    if "train" in stage.model_fields:
        importlib.import_module("stages.training.checkpoints").FIRST_SECONDS = 1e9

    def given(value: dict[str, Any]) -> Input:
        inner = {name: given(nested) for name, nested in value["inputs"].items()}
        metrics = Metrics.model_validate(value.get("metrics", {}))
        return Input(**{**value, "path": Path(value["path"]), "inputs": inner, "metrics": metrics})

    context = Context(
        recipe="bare",
        step=job["step"],
        config=stage.model_validate(job["config"]),
        inputs={name: given(value) for name, value in job["inputs"].items()},
        out=own / "out",
        scratch=own / "scratch",
        checkpoints=own / "checkpoints",
        cache=job_file.parent / "cache",
        progress=lambda *_: None,
    )
    metrics = stage.load("run")(context).to_json()
    (own / "metrics.json").write_text(json.dumps(metrics))


# -------------------------------------------------------------------------------------------------- nothing to do


def nothing_to_do(recipe: str, runs: Path, times: int = 7) -> dict[str, float]:
    """Median seconds of `--plan` and of a run in which all is cached, after one that warms up."""
    calls = {
        "--plan": command(recipe, "--runs", str(runs), "--plan"),
        "all cached": command(recipe, "--runs", str(runs)),
    }
    found = {}
    for name, call in calls.items():
        timed(call)
        found[name] = statistics.median(timed(call) for _ in range(times))
    return found


def imports_torch(recipe: str, runs: Path) -> bool:
    code = "import sys; from pipeline.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    call = [sys.executable, "-P", "-c", code, recipe, "--runs", str(runs)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.stdout.splitlines()[-1] == "True"


def write_grid(folder: Path) -> Path:
    """A recipe of CELLS trainings of the pocket model, their evaluations, and a report."""
    pocket = ROOT / "recipes" / "pocket"
    data, test = pocket / "data" / "instructions.train.jsonl", pocket / "data" / "knowledge.test.jsonl"
    cells = [CELL.format(number=i, data=data, prompt=round(i / CELLS, 6)) for i in range(CELLS)]
    models = ", ".join(f"wit{i}" for i in range(CELLS))
    head = f"name: grid\nmodel: {pocket / 'model'}\nstages:\n"
    recipe = folder / "grid.yaml"
    recipe.write_text(head + "".join(cells) + TAIL.format(models=models, tasks=pocket / "tasks", test=test))
    return recipe


def fill_store(recipe: Path, runs: Path) -> Plan:
    """Publish something for every step: eight files of 4 KiB, and a manifest as long as real ones."""
    plan, store = make_plan(recipes.load(recipe), HashCache(runs / "none")), Store(runs / "store")
    refresh(plan, store)
    packages = {f"package-{i}": "1.2.3" for i in range(120)}
    for step in plan.steps:
        out = store.unfinished(str(step.fingerprint)) / "out"
        out.mkdir(parents=True)
        for i in range(8):
            (out / f"file-{i}.bin").write_bytes(step.name.encode() * (4096 // len(step.name)))
        table = {"table": {"columns": ["model"], "rows": []}, "summary": "none"} if step.kind == "report" else {}
        manifest = {
            **{"step": step.name, "kind": step.kind, "version": step.config.version, "fingerprint": step.fingerprint},
            **{"config": step.config.model_dump(), "inputs": inputs_of(step, plan), "metrics": table},
            **{"environment": {"packages": packages}, "started": "2026-01-01T00:00:00+00:00", "seconds": 1.0},
        }
        step.published = store.publish(out, manifest)
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "wit_dpo.yaml"))
    parser.add_argument("--pairs", type=int, default=2, help="runs of each kind; 0 leaves part 1 out")
    parser.add_argument("--bare-step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare_step:
        bare_step(options.bare_step)
        return 0
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = []
        for i in range(options.pairs):
            (folder / f"bare-{i}").mkdir()
            alone = bare(options.recipe, folder / f"bare-{i}")
            pairs.append((timed(command(options.recipe, "--runs", str(folder / f"runs-{i}"))), alone))
            print(f"the command {pairs[-1][0]:.1f} s, bare stages {alone:.1f} s", flush=True)
        if pairs:
            ratio = sum(with_all for with_all, _ in pairs) / sum(alone for _, alone in pairs)
            print(f"orchestration adds {100 * (ratio - 1):+.1f} % (aim: at most 3 %)")
            _tell_nothing("the recipe", options.recipe, folder / "runs-0", 0.7)
        grid = write_grid(folder)
        plan = fill_store(grid, folder / "grid")
        time.sleep(3)  # files that were just written are read again, for they may still change
        _tell_nothing(f"{CELLS} cells, {len(plan.steps)} steps", str(grid), folder / "grid", 3.0)
    return 0


def _tell_nothing(what: str, recipe: str, runs: Path, aim: float) -> None:
    for name, seconds in nothing_to_do(recipe, runs).items():
        print(f"{what}, {name}: {seconds:.2f} s (aim: at most {aim} s)")
    print(f"{what}: torch imported: {imports_torch(recipe, runs)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
