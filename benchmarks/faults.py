"""Kill a run again and again, and compare what comes out: python -m benchmarks.faults [RECIPE] [--kills 30] [--seed 0]

Runs the recipe (recipes/wit_dpo.yaml unless another is named) once without interruption. Then runs it into another
folder and kills it (SIGKILL: the command, the worker of a step, or both) at random moments of every step, and in the
moments in which a step's result is published; starts it anew each time. In the end every file of every step has to be
the same to the byte; of the report, which tells how long things took, results.csv. One step runs at a time (--jobs 1),
so that a kill hits the step it is meant for.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VICTIMS = ("command", "worker", "both")
POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Kill:
    """One kill: what was hit, and what it left."""

    step: str
    victim: str
    while_publishing: bool
    left: str


class Runner:
    """Starts the command on one recipe and one folder of runs."""

    def __init__(self, recipe: str, runs: Path) -> None:
        self.recipe, self.runs = recipe, runs
        self.steps: list[dict[str, Any]] = json.loads(self._done("--plan", "--json"))["steps"]

    def whole(self) -> dict[str, dict[str, str]]:
        """Run to the end; step -> file -> sha256 of what is published."""
        record = json.loads(self._done("--json"))
        assert record["status"] == "done", record
        found = {}
        for step in record["steps"]:
            manifest = json.loads((self.runs / step["path"] / "stage.json").read_text())
            csv = {name: sha for name, sha in manifest["outputs"].items() if name == "results.csv"}
            found[step["step"]] = csv or manifest["outputs"]
        return found

    def seconds(self) -> dict[str, float]:
        """Step -> how long it took in the last run."""
        name = json.loads(self._done("--plan", "--json"))["recipe"]
        record = json.loads((self.runs / name / "run.json").read_text())
        return {step["step"]: step["seconds"] or 0.0 for step in record["steps"]}

    def killed(self, step: dict[str, Any], victim: str, delay: float | None) -> Kill | None:
        """Start the run and kill it `delay` seconds after `step` began, or (None) in the moment it publishes.

        None where the step's result is there already.
        """
        place = self.runs / "store" / step["kind"] / step["fingerprint"]
        work = self.runs / "store" / "unfinished" / step["fingerprint"]
        if place.exists():
            return None
        log = (self.runs.parent / "killed.txt").open("a")
        process = subprocess.Popen(
            self._call(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        while not _workers(work) and not place.exists():
            assert process.poll() is None, f"it ended before {step['step']} began; see {log.name}"
            time.sleep(0.01)
        until = None if delay is None else time.monotonic() + delay
        while not place.exists() and (until is None or time.monotonic() < until):
            if until is None and any((work / "out").glob("*stage.json*")):
                break
            assert process.poll() is None
            time.sleep(POLL_SECONDS)
        for pid in _workers(work) if victim != "command" else []:
            _send(pid, signal.SIGKILL)
        if victim == "worker":
            time.sleep(1)  # the command sees it, and would go on with what does not need the step
        _send(process.pid, signal.SIGTERM if victim == "worker" else signal.SIGKILL)
        process.wait()
        return Kill(step["step"], victim, delay is None, _left(work, place))

    def _call(self, *arguments: str) -> list[str]:
        line = [sys.executable, "-P", "-m", "pipeline.cli", self.recipe, "--runs", str(self.runs), "--jobs", "1"]
        return [*line, *arguments]

    def _done(self, *arguments: str) -> str:
        return subprocess.run(self._call(*arguments), stdout=subprocess.PIPE, text=True, check=True).stdout


def _workers(work: Path) -> list[int]:
    """The processes whose command line names the folder `work`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and work.name.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _left(work: Path, place: Path) -> str:
    if place.exists():
        return "published"
    if (work / "out" / "stage.json").exists():
        return "a complete result, not yet in its place"
    steps = [int(seal.parent.name.partition("-")[2]) for seal in work.glob("checkpoints/*/sealed.json")]
    return f"checkpoint of step {max(steps)}" if steps else "nothing to go on from"


def faults(recipe: str, folder: Path, kills: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Do it in `folder`; the kills, and what differs from an uninterrupted run."""
    draw = random.Random(seed)
    uninterrupted = Runner(recipe, folder / "whole")
    expected, seconds = uninterrupted.whole(), uninterrupted.seconds()
    runner = Runner(recipe, folder / "killed")
    done: list[Kill] = []
    for index, step in enumerate(runner.steps):
        share = (kills - len(done)) // (len(runner.steps) - index)
        for number in range(share):
            publishing = number == share - 1 and (share > 1 or index % 2 == 1)
            delay = None if publishing else draw.uniform(0, seconds[step["step"]] / max(1, share - 1))
            if kill := runner.killed(step, VICTIMS[len(done) % len(VICTIMS)], delay):
                done.append(kill)
                _tell(len(done), kill)
    found = runner.whole()
    differ = [
        f"{step}/{name}"
        for step in expected
        for name in sorted(expected[step].keys() | found[step].keys())
        if expected[step].get(name) != found[step].get(name)
    ]
    return done, differ


def _tell(number: int, kill: Kill) -> None:
    moment = "while it published" if kill.while_publishing else "at a random moment"
    print(f"{number:3} {kill.step:16} {moment:19} killed: {kill.victim:8} left: {kill.left}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/wit_dpo.yaml")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        done, differ = faults(options.recipe, Path(folder), options.kills, options.seed)
    print(f"{len(done)} kills, {time.monotonic() - began:.0f} s; files that differ: {differ or 'none'}")
    return 1 if differ or len(done) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
