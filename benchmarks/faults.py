"""Kill a run many times, and compare its results with those of an uninterrupted run.

    python -m benchmarks.faults [RECIPE] [--kills 30] [--seed 0]

Runs the recipe (by default recipes/wit_dpo.yaml) without interruption. Then runs it in another folder, kills it
(SIGKILL to the command, the worker of a step, or both) at random moments of every step and while a step publishes its
result, and restarts it each time. At the end all files of all steps must be equal to the byte; of the report, which
contains times, only results.csv. Steps run one at a time (--jobs 1), so that a kill hits the intended step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VICTIMS = ("command", "worker", "both")
POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Kill:
    """One kill."""

    step: str
    victim: str
    while_publishing: bool
    remainder: str
    """What the killed step left on disk."""


class Runner:
    """Runs the command on one recipe and one folder of runs."""

    def __init__(self, recipe: str, runs: Path) -> None:
        self.recipe, self.runs = recipe, runs
        self.steps: list[dict[str, Any]] = json.loads(self._run("--plan", "--json"))["steps"]

    def complete(self) -> dict[str, dict[str, str]]:
        """Run to the end. Returns step -> file -> SHA-256 of the published files."""
        record = json.loads(self._run("--json"))
        assert record["status"] == "done", record
        hashes = {}
        for step in record["steps"]:
            outputs = json.loads((self.runs / step["path"] / "stage.json").read_text())["outputs"]
            csv = {name: sha for name, sha in outputs.items() if name == "results.csv"}
            hashes[step["step"]] = csv or outputs
        return hashes

    def seconds(self) -> dict[str, float]:
        """Map each step to its seconds in the last run."""
        name = json.loads(self._run("--plan", "--json"))["recipe"]
        record = json.loads((self.runs / name / "run.json").read_text())
        return {step["step"]: step["seconds"] or 0.0 for step in record["steps"]}

    def kill(self, step: dict[str, Any], victim: str, delay: float | None) -> Kill | None:
        """Start the run and kill it `delay` seconds after `step` began, or while it publishes if `delay` is None.

        Returns None if the step is published before the kill.
        """
        published = self.runs / "store" / step["kind"] / step["fingerprint"]
        work = self.runs / "store" / "unfinished" / step["fingerprint"]
        if published.exists():
            return None
        log = (self.runs.parent / "killed.txt").open("a")
        process = subprocess.Popen(
            self._call(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        while not _workers(work) and not published.exists():
            assert process.poll() is None, f"the command ended before {step['step']} began; see {log.name}"
            time.sleep(0.01)
        deadline = None if delay is None else time.monotonic() + delay
        while not published.exists() and (deadline is None or time.monotonic() < deadline):
            if deadline is None and any((work / "out").glob("*stage.json*")):
                break
            assert process.poll() is None
            time.sleep(POLL_SECONDS)
        for pid in _workers(work) if victim != "command" else []:
            _send(pid, signal.SIGKILL)
        if victim == "worker":  # the command has time to notice, but not to run the next step
            _wait_for(published.exists, seconds=1)
        _send(process.pid, signal.SIGTERM if victim == "worker" else signal.SIGKILL)
        process.wait()
        return Kill(step["step"], victim, delay is None, _remainder(work, published))

    def _call(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-P", "-m", "pipeline.cli", self.recipe, "--runs", str(self.runs), "--jobs", "1"]
        return [*command, *arguments]

    def _run(self, *arguments: str) -> str:
        return subprocess.run(self._call(*arguments), stdout=subprocess.PIPE, text=True, check=True).stdout


def _workers(work: Path) -> list[int]:
    """Return the ids of processes whose command line contains the folder: equal steps of other runs have its name."""
    ids, path = [], str(work.resolve()).encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and path in (folder / "cmdline").read_bytes():
                ids.append(int(folder.name))
        except OSError:
            continue  # the process has ended
    return ids


def _wait_for(is_reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_reached() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _remainder(work: Path, published: Path) -> str:
    if published.exists():
        return "published"
    if (work / "out" / "stage.json").exists():
        return "a complete result, not yet renamed into place"
    steps = [int(seal.parent.name.partition("-")[2]) for seal in work.glob("checkpoints/*/sealed.json")]
    return f"checkpoint of step {max(steps)}" if steps else "nothing to resume from"


def faults(recipe: str, folder: Path, kills: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Run the benchmark in `folder`. Returns the kills, and the files that differ from the uninterrupted run."""
    rng = random.Random(seed)
    uninterrupted = Runner(recipe, folder / "uninterrupted")
    expected, seconds = uninterrupted.complete(), uninterrupted.seconds()
    runner = Runner(recipe, folder / "killed")
    kills_done: list[Kill] = []
    for index, step in enumerate(runner.steps):
        share = (kills - len(kills_done)) // (len(runner.steps) - index)
        for number in range(share):
            publishing = number == share - 1 and (share > 1 or index % 2 == 1)
            delay = None if publishing else rng.uniform(0, seconds[step["step"]] / max(1, share - 1))
            if kill := runner.kill(step, VICTIMS[len(kills_done) % len(VICTIMS)], delay):
                kills_done.append(kill)
                _print_kill(len(kills_done), kill)
    hashes = runner.complete()
    differ = [
        f"{step}/{name}"
        for step in expected
        for name in sorted(expected[step].keys() | hashes[step].keys())
        if expected[step].get(name) != hashes[step].get(name)
    ]
    return kills_done, differ


def _print_kill(number: int, kill: Kill) -> None:
    moment = "while it published" if kill.while_publishing else "at a random moment"
    print(f"{number:3} {kill.step:16} {moment:19} killed: {kill.victim:8} left: {kill.remainder}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print. Returns 0 if no file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/wit_dpo.yaml")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        start_time = time.monotonic()
        kills_done, differ = faults(options.recipe, Path(folder), options.kills, options.seed)
    print(f"{len(kills_done)} kills, {time.monotonic() - start_time:.0f} s; files that differ: {differ or 'none'}")
    return 1 if differ or len(kills_done) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
