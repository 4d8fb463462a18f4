"""Measure how the cost of planning and scheduling grows with the number of steps.

    python -m benchmarks.scale [--cells 35 525 10000] [--steps 200] [--no-ray]

With a stage that does nothing, one step per cell:

1. `run-recipe --plan`: seconds and peak memory of the command.
2. A run whose steps take no time, in one process: locks, job files, hashes, publishing, links, run.json. Milliseconds
   per step and peak memory.
3. The command on `--steps` steps with a worker process each, locally and on a Ray cluster of two nodes, compared with
   the same workers without the pipeline. The difference is the cost of scheduling.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.data import ROOT, machine, run_recipe
from pipeline.console.console import Console
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection
from pipeline.preflight.prepare import prepare
from pipeline.recipe.loader import load
from pipeline.run.executor import Event, Executor, worker_environment
from pipeline.run.job import Job, StepResult
from pipeline.run.local_executor import LocalExecutor
from pipeline.run.loop import Run
from pipeline.store.store import Store
from stages.base import Resources, StageConfig
from stages.records.metrics import Metrics

NOTHING = Path(__file__).with_name("nothing")
ENVIRONMENT = {"BENCHMARK_NOTHING": "1", "BENCHMARK_ROOT": str(ROOT), "PYTHONPATH": f"{NOTHING}{os.pathsep}{ROOT}"}
RECIPE = """\
name: scale
matrix: {{cell: [{cells}]}}
stages:
  nothing: {{kind: nothing, value: "${{matrix.cell}}"}}
"""


def write(folder: Path, cells: int) -> Path:
    """Write a recipe of `cells` cells."""
    recipe = folder / f"scale-{cells}.yaml"
    recipe.write_text(RECIPE.format(cells=", ".join(f"{i}.0" for i in range(cells))))
    return recipe


def measured(call: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command, and return its seconds and its peak memory in GiB."""
    start_time = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, call
    return time.perf_counter() - start_time, usage.ru_maxrss / 2**20


class Instant(Executor):
    """An executor whose steps take no time."""

    width = 2

    def __init__(self) -> None:
        self._events: deque[Event] = deque()

    def unmet_requirement(self, config: StageConfig) -> None:
        """No requirement."""

    def has_room(self, resources: Resources, processes: int) -> bool:
        """Accept two steps at a time."""
        return len(self._events) < self.width

    def start(self, job: Job) -> None:
        """Write what a worker writes."""
        (job.folder / "out").mkdir()
        (job.folder / "out" / "nothing").touch()
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        self._events.append(Event(job, StepResult(Metrics(), outputs={"nothing": empty}, machine={})))

    def wait(self, seconds: float | None = None) -> Event | None:
        """Return the next result."""
        return self._events.popleft() if self._events else None

    def stop(self) -> None:
        """Nothing runs."""


def _prepare(recipe: Path, runs: Path) -> Run:
    console = Console(quiet_stdout=True)
    store, resolver = Store(runs / "store"), Resolver(runs, console.say)
    plan = build_plan(load(recipe), resolver)
    selection = Selection(frozenset(step.name for step in plan.steps), frozenset())
    decisions = prepare(plan, selection, store, resolver).decisions
    return Run(plan, selection, decisions, store, resolver, console, {})


def schedule(recipe: Path, runs: Path) -> None:
    """Run all cells with steps that take no time, and print milliseconds per step and GiB."""
    run = _prepare(recipe, runs)
    start_time = time.perf_counter()
    assert run.execute(Instant()) == 0
    seconds = time.perf_counter() - start_time
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{1000 * seconds / len(run.plan.steps):.1f} ms a step, {memory:.2f} GiB")


def bare(recipe: Path, runs: Path) -> None:
    """Run the workers of all steps without the pipeline, with its parallelism, and print the seconds."""
    run, executor = _prepare(recipe, runs), LocalExecutor()

    def work(job: Job) -> None:
        call = [sys.executable, "-P", "-m", "pipeline.run.worker", str(job.file)]
        environment = os.environ | worker_environment(executor.threads) | executor.variables([0], [])
        with subprocess.Popen(
            call, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            assert process.wait() == 0

    jobs = [run._job(step, step.config.resources) for step in run.plan.steps]
    for job in jobs:
        job.write()
    start_time = time.perf_counter()
    with ThreadPoolExecutor(executor.jobs) as pool:
        list(pool.map(work, jobs))
    print(time.perf_counter() - start_time)


PARTS = {"schedule": schedule, "bare": bare}


def part(name: str, recipe: Path, runs: Path) -> str:
    """Run one of PARTS in its own process, and return its output."""
    call = [sys.executable, "-P", "-m", "benchmarks.scale", "--part", name, str(recipe), str(runs)]
    process = subprocess.run(call, env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True)
    return process.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[35, 525, 10_000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        name, recipe, runs = options.part
        PARTS[name](Path(recipe), Path(runs))
        return 0
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for cells in options.cells:
            recipe, runs = write(folder, cells), folder / f"runs-{cells}"
            seconds, memory = measured(run_recipe(str(recipe), "--plan", "--runs", str(runs)), ENVIRONMENT)
            aim = " (aim: at most 3 s)" if cells == 525 else ""
            print(f"{cells} cells, --plan: {seconds:.2f} s{aim}, {memory:.2f} GiB", flush=True)
            print(f"{cells} cells, steps that take no time: {part('schedule', recipe, runs)}", flush=True)
        _measure_workers(folder, options.steps, with_ray=not options.no_ray)
    return 0


def _measure_workers(folder: Path, steps: int, with_ray: bool) -> None:
    recipe = write(folder, steps)
    bare_seconds = float(part("bare", recipe, folder / "bare"))
    print(
        f"{steps} bare workers, {LocalExecutor().jobs} at a time: {1000 * bare_seconds / steps:.0f} ms a step",
        flush=True,
    )
    local, _ = measured(run_recipe(str(recipe), "--runs", str(folder / "local")), ENVIRONMENT)
    _print_scheduling("local", steps, local, bare_seconds, 50)
    if with_ray:
        os.environ.update(ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0"})  # for the processes that the nodes start
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray_environment = ENVIRONMENT | {"RAY_ADDRESS": cluster.address}
        one_step, _ = measured(
            run_recipe(str(write(folder, 1)), "--runs", str(folder / "one"), "--executor", "ray"), ray_environment
        )
        all_steps, _ = measured(
            run_recipe(str(recipe), "--runs", str(folder / "ray"), "--executor", "ray"), ray_environment
        )
        print(f"joining the cluster and one step: {one_step:.1f} s")
        _print_scheduling("Ray, two nodes", steps, all_steps - one_step, bare_seconds, 100)
        cluster.shutdown()


def _print_scheduling(where: str, steps: int, seconds: float, bare_seconds: float, aim: int) -> None:
    added = 1000 * (seconds - bare_seconds) / steps
    print(f"{where}, {steps} steps: {1000 * seconds / steps:.0f} ms a step, so scheduling adds {added:.0f} ms", end=" ")
    print(f"(aim: at most {aim} ms)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
