"""Measure what the pipeline costs in addition to the stages.

    python -m benchmarks.overhead [RECIPE] [--pairs 2]

1. Runs the recipe (by default recipes/wit_dpo.yaml) with the command, and its bare stages: the same functions on the
   same inputs, one process each, with the same parallelism and dependencies, but no store, hashes, checkpoints or
   locks. The two alternate, so that a slow minute of the machine affects both. Prints both times and the ratio.
2. `--plan`, and a run in which everything is cached: seconds, and whether torch was imported.
3. The same for a recipe of 525 trainings with their evaluations and a report, in a store filled with dummy results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data import ROOT, machine, run_recipe
from pipeline.plan.cache import decide, input_records
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan, Step
from pipeline.recipe.loader import load
from pipeline.run.executor import worker_environment
from pipeline.run.job import Job, read_job
from pipeline.run.local_executor import LocalExecutor
from pipeline.store.references import Reference, fetch
from pipeline.store.store import Published, Store
from stages.base import Context, Input
from stages.kinds import KINDS
from stages.records.manifest import Manifest
from stages.records.metrics import Metrics, ResultTable
from stages.system.integrity import files_in

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


def timed(call: list[str]) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start_time = time.perf_counter()
    process = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return time.perf_counter() - start_time


# ------------------------------------------------------------------------------------------------------ bare stages


def bare(recipe: str, folder: Path) -> float:
    """Run the stages of `recipe` without the pipeline, and return the seconds."""
    plan = build_plan(load(Path(recipe)), Resolver(folder, print))
    executor = LocalExecutor()
    waiting, running, finished = list(plan.steps), {}, set()
    slots = list(range(executor.jobs))
    start_time = time.perf_counter()
    while waiting or running:
        for step in [s for s in waiting if all(source.name in finished for source in s.dependencies)]:
            if slots:
                waiting.remove(step)
                slot = slots.pop(0)
                running[step.name] = slot, _start(step, folder, executor, slot)
        for name, (slot, process) in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, (folder / f"{name}.log").read_text()
                del running[name]
                finished.add(name)
                slots.append(slot)
        time.sleep(0.005)
    return time.perf_counter() - start_time


def _start(step: Step, folder: Path, executor: LocalExecutor, slot: int) -> subprocess.Popen[bytes]:
    job = Job(
        recipe="bare",
        step=step.name,
        kind=step.kind,
        config=step.config.model_dump(),
        inputs={name: _input(source, folder) for name, source in step.inputs.items()},
        folder=folder / step.name,
        cache=folder / "cache",
        log=folder / f"{step.name}.log",
        lock=folder / f"{step.name}.lock",
        resources=step.config.resources,
        processes=step.config.processes,
    )
    job.write()
    environment = os.environ | worker_environment(executor.threads) | executor.variables([slot], [])
    environment["PYTHONPATH"] = str(ROOT)
    call = [sys.executable, "-P", "-m", "benchmarks.overhead", "--bare-step", str(job.file)]
    with job.log.open("wb") as log:
        return subprocess.Popen(call, env=environment, stdout=log, stderr=log)


def _input(source: Step | Reference, folder: Path) -> Input:
    if not isinstance(source, Step):
        return Input(fetch(source, folder / "cache"), fingerprint=str(source))
    return Input(
        path=folder / source.name / "out",
        step=source.name,
        kind=source.kind,
        fingerprint=source.name,
        config=source.config.model_dump(),
        metrics=Metrics.model_validate_json((folder / source.name / "metrics.json").read_text()),
        inputs={name: _input(inner, folder) for name, inner in source.inputs.items()},
    )


def bare_step(job_file: Path) -> None:
    """Run one stage in this process."""
    job = read_job(job_file)
    stage = KINDS[job.kind]
    for name in ("out", "scratch", "checkpoints"):
        (job.folder / name).mkdir()
    if "train" in stage.model_fields:
        importlib.import_module("stages.training.checkpoints").MIN_INTERVAL = 1e9
    context = Context(
        recipe=job.recipe,
        step=job.step,
        config=stage.model_validate(job.config),
        inputs=dict(job.inputs),
        out=job.folder / "out",
        scratch=job.folder / "scratch",
        checkpoints=job.folder / "checkpoints",
        cache=job.cache,
        progress=lambda *_: None,
    )
    metrics = stage.load("run")(context).to_json()
    (job.folder / "metrics.json").write_text(json.dumps(metrics))


# -------------------------------------------------------------------------------------------------- everything cached


def seconds_when_cached(recipe: str, runs: Path, times: int = 7) -> dict[str, float]:
    """Return the median seconds of `--plan` and of a run in which everything is cached, after a warm-up."""
    calls = {
        "--plan": run_recipe(recipe, "--runs", str(runs), "--plan"),
        "all cached": run_recipe(recipe, "--runs", str(runs)),
    }
    medians = {}
    for name, call in calls.items():
        timed(call)
        medians[name] = statistics.median(timed(call) for _ in range(times))
    return medians


def imports_torch(recipe: str, runs: Path) -> bool:
    code = "import sys; from pipeline.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    call = [sys.executable, "-P", "-c", code, recipe, "--runs", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    return process.stdout.splitlines()[-1] == "True"


def write_grid(folder: Path) -> Path:
    """Write a recipe of CELLS trainings of the pocket model, their evaluations, and a report."""
    pocket = ROOT / "recipes" / "pocket"
    data, test = pocket / "data" / "instructions.train.jsonl", pocket / "data" / "knowledge.test.jsonl"
    cells = [CELL.format(number=i, data=data, prompt=round(i / CELLS, 6)) for i in range(CELLS)]
    models = ", ".join(f"wit{i}" for i in range(CELLS))
    head = f"name: grid\nmodel: {pocket / 'model'}\nstages:\n"
    recipe = folder / "grid.yaml"
    recipe.write_text(head + "".join(cells) + TAIL.format(models=models, tasks=pocket / "tasks", test=test))
    return recipe


def fill_store(recipe: Path, runs: Path) -> Plan:
    """Publish a dummy result for every step: eight files of 4 KiB, and a manifest of realistic length."""
    store, resolver = Store(runs / "store"), Resolver(runs, print)
    plan = build_plan(load(recipe), resolver)
    decisions = decide(plan, store, resolver)
    packages = {f"package-{i}": "1.2.3" for i in range(120)}
    report = Metrics(table=ResultTable(columns=["model"], rows=[]), summary="none")
    results: dict[str, Published] = {}
    for step in plan.steps:
        fingerprint = str(decisions[step.name].fingerprint)
        out = store.unfinished(fingerprint) / "out"
        out.mkdir(parents=True)
        for i in range(8):
            (out / f"file-{i}.bin").write_bytes(step.name.encode() * (4096 // len(step.name)))
        manifest = Manifest(
            step=step.name,
            kind=step.kind,
            version=step.config.version,
            fingerprint=fingerprint,
            config=step.config.model_dump(),
            inputs=input_records(step, decisions, results, resolver),
            metrics=report if step.kind == "report" else Metrics(),
            environment={"packages": packages},
            started="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            outputs=files_in(out),
        )
        results[step.name] = store.publish(out, manifest)
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "wit_dpo.yaml"))
    parser.add_argument("--pairs", type=int, default=2, help="runs with and without the pipeline; 0 skips part 1")
    parser.add_argument("--bare-step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare_step:
        bare_step(options.bare_step)
        return 0
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = []
        for i in range(options.pairs):
            (folder / f"bare-{i}").mkdir()
            bare_seconds = bare(options.recipe, folder / f"bare-{i}")
            pairs.append((timed(run_recipe(options.recipe, "--runs", str(folder / f"runs-{i}"))), bare_seconds))
            print(f"the command {pairs[-1][0]:.1f} s, bare stages {bare_seconds:.1f} s", flush=True)
        if pairs:
            ratio = sum(seconds for seconds, _ in pairs) / sum(bare_seconds for _, bare_seconds in pairs)
            print(f"orchestration adds {100 * (ratio - 1):+.1f} % (aim: at most 3 %)")
            _print_cached("the recipe", options.recipe, folder / "runs-0", 0.7)
        grid = write_grid(folder)
        plan = fill_store(grid, folder / "grid")
        time.sleep(3)  # hashes of files written in the last seconds are not remembered
        _print_cached(f"{CELLS} cells, {len(plan.steps)} steps", str(grid), folder / "grid", 3.0)
    return 0


def _print_cached(subject: str, recipe: str, runs: Path, aim: float) -> None:
    for name, seconds in seconds_when_cached(recipe, runs).items():
        print(f"{subject}, {name}: {seconds:.2f} s (aim: at most {aim} s)")
    print(f"{subject}: torch imported: {imports_torch(recipe, runs)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
