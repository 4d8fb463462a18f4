"""How planning and scheduling grow: python -m benchmarks.scale [--cells 35 525 10000] [--steps 200] [--no-ray]

With a stage that does nothing, one step a cell:

1. `run-recipe --plan`: seconds of the command, its largest memory.
2. A run whose steps take no time, in one process: locks, job files, hashes, publishing, links, run.json. Milliseconds a
   step, and the largest memory.
3. The command on `--steps` real steps, a worker process each: locally, and on a Ray cluster of two nodes. Beside it the
   bare workers, as many at a time, without the pipeline. The difference is what scheduling adds to a step.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.console.console import Console
from pipeline.plan.cache import refresh
from pipeline.plan.planner import make_plan
from pipeline.recipe import loader as recipes
from pipeline.run.job import write_job
from pipeline.run.local_executor import ORDINARY, Event, Job, LocalExecutor
from pipeline.run.loop import Run
from pipeline.store.hash_cache import HashCache
from pipeline.store.store import Store
from stages.base import Resources, StageConfig

ROOT = Path(__file__).resolve().parent.parent
NOTHING = Path(__file__).with_name("nothing")
ENVIRONMENT = {"BENCHMARK_NOTHING": "1", "BENCHMARK_ROOT": str(ROOT), "PYTHONPATH": f"{NOTHING}{os.pathsep}{ROOT}"}
RECIPE = """\
name: scale
matrix: {{cell: [{cells}]}}
stages:
  nothing: {{kind: nothing, value: "${{matrix.cell}}"}}
"""


def write(folder: Path, cells: int) -> Path:
    """A recipe of so many cells."""
    recipe = folder / f"scale-{cells}.yaml"
    recipe.write_text(RECIPE.format(cells=", ".join(f"{i}.0" for i in range(cells))))
    return recipe


def measured(call: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds that a command takes, and GiB of its largest memory."""
    began = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, call
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def command(recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.cli", str(recipe), *arguments]


class Instant:
    """An executor whose steps take no time."""

    width = 2

    def __init__(self) -> None:
        self._events: deque[Event] = deque()

    def unmet_requirement(self, config: StageConfig) -> None:
        """Nothing."""

    def has_room(self, takes: Resources = ORDINARY, processes: int = 1) -> bool:
        """For two at a time."""
        return len(self._events) < self.width

    def start(self, job: Job) -> None:
        """Leave what a worker would leave."""
        (job.folder / "out").mkdir()
        (job.folder / "out" / "nothing").touch()
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        result = {"metrics": {}, "outputs": {"nothing": empty}, "machine": {}}
        self._events.append(Event(job, result=result))

    def wait(self, seconds: float | None = None) -> Event | None:
        """The next result."""
        return self._events.popleft() if self._events else None

    def stop(self) -> None:
        """Nothing runs."""


def _run_of(recipe: Path, runs: Path) -> Run:
    plan = make_plan(recipes.load(recipe), HashCache(runs / "none"))
    return Run(plan, Store(runs / "store"), runs, Console(quiet_stdout=True), {step.name for step in plan.steps}, set())


def schedule(recipe: Path, runs: Path) -> None:
    """Run all cells with steps that take no time; prints milliseconds a step and GiB."""
    run = _run_of(recipe, runs)
    run.prepare()
    began = time.perf_counter()
    assert run.execute(Instant()) == 0
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{1000 * seconds / len(run.plan.steps):.1f} ms a step, {memory:.2f} GiB")


def bare(recipe: Path, runs: Path) -> None:
    """Run the workers of all steps without the pipeline, as many at a time as it would; prints the seconds."""
    run, executor = _run_of(recipe, runs), LocalExecutor()
    refresh(run.plan, run.store)

    def work(job: Job) -> None:
        call = [sys.executable, "-P", "-m", "pipeline.run.loop.worker", str(job.folder / "job.json")]
        environment = os.environ | executor._share([0], job)
        with subprocess.Popen(
            call, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            assert process.wait() == 0

    jobs = [write_job(step, run.plan, {}, run.store, runs) for step in run.plan.steps]
    began = time.perf_counter()
    with ThreadPoolExecutor(executor.jobs) as pool:
        list(pool.map(work, jobs))
    print(time.perf_counter() - began)


PARTS = {"schedule": schedule, "bare": bare}


def part(name: str, recipe: Path, runs: Path) -> str:
    """What one of PARTS prints in a process of its own."""
    call = [sys.executable, "-P", "-m", "benchmarks.scale", "--part", name, str(recipe), str(runs)]
    done = subprocess.run(call, env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


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
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for cells in options.cells:
            recipe, runs = write(folder, cells), folder / f"runs-{cells}"
            seconds, memory = measured(command(recipe, "--plan", "--runs", str(runs)), ENVIRONMENT)
            aim = " (aim: at most 3 s)" if cells == 525 else ""
            print(f"{cells} cells, --plan: {seconds:.2f} s{aim}, {memory:.2f} GiB", flush=True)
            print(f"{cells} cells, steps that take no time: {part('schedule', recipe, runs)}", flush=True)
        _real(folder, options.steps, with_ray=not options.no_ray)
    return 0


def _real(folder: Path, steps: int, with_ray: bool) -> None:
    recipe = write(folder, steps)
    alone = float(part("bare", recipe, folder / "bare"))
    print(f"{steps} bare workers, {LocalExecutor().jobs} at a time: {1000 * alone / steps:.0f} ms a step", flush=True)
    local, _ = measured(command(recipe, "--runs", str(folder / "local")), ENVIRONMENT)
    _tell("local", steps, local, alone, 50)
    if with_ray:
        os.environ.update(ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0"})  # for what its machines start
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray_environment = ENVIRONMENT | {"RAY_ADDRESS": cluster.address}
        joined, _ = measured(
            command(write(folder, 1), "--runs", str(folder / "one"), "--executor", "ray"), ray_environment
        )
        whole, _ = measured(command(recipe, "--runs", str(folder / "ray"), "--executor", "ray"), ray_environment)
        print(f"joining the cluster and one step: {joined:.1f} s")
        _tell("Ray, two nodes", steps, whole - joined, alone, 100)
        cluster.shutdown()


def _tell(where: str, steps: int, whole: float, alone: float, aim: int) -> None:
    added = 1000 * (whole - alone) / steps
    print(f"{where}, {steps} steps: {1000 * whole / steps:.0f} ms a step, so scheduling adds {added:.0f} ms", end=" ")
    print(f"(aim: at most {aim} ms)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
