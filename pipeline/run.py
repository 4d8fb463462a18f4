"""Plan -> events: runs the steps that have no result yet, side by side where they can, and publishes what they make."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import Artifact, ArtifactError, Hub, Local
from pipeline.console import Console
from pipeline.executors import Job, LocalExecutor
from pipeline.places import split_key
from pipeline.plan import Plan, Step, beginning, below, changed_input, inputs_of, refresh
from pipeline.provenance import environment
from pipeline.recipe import RecipeError
from pipeline.secret import mask_file, masked
from pipeline.store import Store, write_json
from stages.base import BadInput
from stages.names import file_name


@dataclass(frozen=True)
class Running:
    """A step whose worker is at work."""

    step: Step
    job: Job
    began: float
    """On the monotonic clock, in seconds."""
    started: str
    """Time of day, ISO 8601, UTC."""


@dataclass
class Run:
    """One run of a plan: what was asked for, and how each step went."""

    plan: Plan
    store: Store
    runs: Path
    """The folder given by --runs."""
    console: Console
    chosen: set[str]
    """The names of the steps that may run; the others must be cached where they are needed."""
    forced: set[str]
    """The names of the steps that run although they are cached."""
    outcome: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[Artifact, Path] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where this recipe's links, logs and run.json lie."""
        return self.runs / self.plan.recipe.name

    def prepare(self) -> None:
        """Find out all that can be known wrong before anything runs. Raises RecipeError; writes only to the cache."""
        self._resolve()
        refresh(self.plan, self.store, self.forced, verify=True)
        self.plan.require_inputs(self.chosen)
        todo = [step for step in self.plan.steps if step.name in self.chosen and step.state == "run"]
        self._fetch(todo)
        for step in todo:
            files = {name: path for name, s in step.inputs.items() if (path := beginning(s, self.paths))}
            try:
                step.config.check(files)
            except BadInput as error:
                if error.key:
                    raise self.plan.recipe.error(split_key(f"stages.{step.stage}.{error.key}"), str(error)) from None
                raise RecipeError(str(error).splitlines()) from None

    def execute(self, executor: LocalExecutor) -> int:
        """Run what has to run; 0 where all went well, 1 where a step failed. Raises RecipeError before anything ran."""
        waiting = [step for step in self.plan.steps if step.name in self.chosen and step.state == "run"]
        for step in waiting:
            if lack := executor.lacks(step.config.processes):
                raise self.plan.recipe.error(split_key(f"stages.{step.stage}.launch.num_processes"), lack)
        for step in self.plan.steps:
            if step.state == "cached":
                self._note(step, "cached")
            elif step not in waiting:
                self._note(step, "not asked for")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record("running")
        running: dict[str, Running] = {}
        try:
            while waiting or running:
                waiting = self._start_ready(waiting, running, executor)
                if running and (ended := self._handle(executor, running)):
                    waiting += self._outdated(ended)
        except BaseException:
            executor.stop()
            for work in running.values():
                self._note(work.step, "interrupted")
                mask_file(work.job.log)
                shutil.rmtree(work.job.folder, ignore_errors=True)
            self._record("interrupted")
            raise
        failed = any(state["state"] == "failed" for state in self.outcome.values())
        self._record("failed" if failed else "done")
        return 1 if failed else 0

    def _resolve(self) -> None:
        """Replace references to a branch on the hub by the commit it stands at now."""
        commits: dict[Artifact, Artifact] = {}
        for step in self.plan.steps:
            for name, source in step.inputs.items():
                if isinstance(source, Hub) and not source.commit:
                    if source not in commits:
                        commits[source] = self._have(artifacts.resolve, source)
                        self.plan.where[commits[source]] = self.plan.where[source]
                    step.inputs[name] = commits[source]

    def _fetch(self, steps: Iterable[Step]) -> None:
        code = [source for step in steps for source in step.with_code]
        for source in (source for step in steps for source in step.inputs.values()):
            if not isinstance(source, Step) and source not in self.paths:
                if not isinstance(source, Local):
                    self.console.say(f"fetching {source}")
                self.paths[source] = self._have(artifacts.fetch, source, self.runs / "cache", source in code)

    def _have(self, function: Callable[..., Any], source: Artifact, *arguments: Any) -> Any:
        """What `function` makes of `source`; where it cannot be had, an error at its place in the recipe."""
        try:
            return function(source, *arguments)
        except ArtifactError as error:
            raise RecipeError([f"{self.plan.where[source]}: {error}"]) from None

    def _start_ready(self, waiting: list[Step], running: dict[str, Running], executor: LocalExecutor) -> list[Step]:
        """Start every step whose needs are met while there is room; return those that still wait."""
        still: list[Step] = []
        unsettled = {step.name for step in waiting} | set(running)
        for step in waiting:
            lost = [n.name for n in step.needs if self.outcome.get(n.name, {}).get("state") in ("failed", "skipped")]
            if lost:
                self._note(step, "skipped", error=f"needs {', '.join(lost)}")
                self.console.skipped(step.name, lost)
            elif any(work.step.fingerprint == step.fingerprint for work in running.values()):
                still.append(step)  # the same content under another name: one making serves both
            elif step.name not in self.forced and self._adopt(step):
                continue
            elif executor.has_room(step.config.processes) and not unsettled & below(step):
                job = self._job(step)
                running[step.name] = Running(
                    step, job, time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
                )
                executor.start(job)
                self.console.started(step.name, step.why)
            else:
                still.append(step)
        return still

    def _adopt(self, step: Step) -> bool:
        """Take the result that another step of this run has published under the same fingerprint, if one has."""
        twins = [other for other in self.plan.steps if other is not step and other.fingerprint == step.fingerprint]
        made = [twin.published for twin in twins if self.outcome.get(twin.name, {}).get("state") == "done"]
        if not step.fingerprint or not made or not all(need.published for need in step.needs):
            return False
        step.published = made[0]
        self._note(step, "cached")
        return True

    def _outdated(self, made: Step) -> list[Step]:
        """The cached steps that have to run after all, for `made` came out otherwise than when they were made."""
        outdated = []
        for step in self.plan.steps:
            if step.name in self.chosen and step.state == "cached" and made in step.needs and changed_input(step):
                step.state, step.why, step.published = "run", f"{made.name} came out differently", None
                outdated.append(step)
        return outdated

    def _handle(self, executor: LocalExecutor, running: dict[str, Running]) -> Step | None:
        """Wait for the next event of a running step and act on it; return the step if it has a new result."""
        event = executor.wait()
        work = running[event.job.step]
        step = work.step
        if event.result is None:
            self.console.progress(step.name, event.done, event.total, event.note)
            return None
        del running[step.name]
        seconds = round(time.monotonic() - work.began, 1)
        mask_file(event.job.log)
        error = masked(event.result.get("error") or "") or None
        if error is None:
            error = self._changed_file(step)
        if error is None:
            try:
                self._publish(work, event.result["metrics"], seconds)
            except OSError as problem:
                error = f"its result could not be published: {problem}"
        shutil.rmtree(event.job.folder, ignore_errors=True)
        if error is None:
            self._note(step, "done", seconds)
            self.console.finished(step.name, seconds, event.result["metrics"].get("notes", []))
        else:
            self._note(step, "failed", seconds, error)
            self.console.failed(step.name, error, event.job.log, bool(event.result.get("mendable")))
        self._record("running")
        return step if error is None else None

    def _changed_file(self, step: Step) -> str | None:
        """An error where a file that the step read is not what it was when its fingerprint was taken."""
        for source in step.inputs.values():
            if isinstance(source, Local):
                try:
                    if artifacts.identity(source) == self.plan.contents[source]:
                        continue
                except ArtifactError:
                    pass
                return f"{source.path} was changed while the step ran; run it again"
        return None

    def _job(self, step: Step) -> Job:
        folder = self.store.workspace()
        job = {
            "recipe": self.plan.recipe.name,
            "step": step.name,
            "kind": step.kind,
            "config": step.config.model_dump(),
            "inputs": {name: self._input(source) for name, source in step.inputs.items()},
            "cache": str((self.runs / "cache").resolve()),
        }
        write_json(folder / "job.json", job)
        log = self.folder / "logs" / f"{_file_name(step.name)}.txt"
        return Job(step.name, folder.resolve(), log.resolve(), step.config.processes)

    def _input(self, source: Step | Artifact) -> dict[str, Any]:
        """What a worker is told of an input, with all it was made from."""
        if not isinstance(source, Step):
            path = str(self.paths[source].resolve()) if source in self.paths else str(source)
            return {"path": path, "fingerprint": self.plan.contents.get(source) or "", "inputs": {}}
        assert source.published is not None
        return {
            "path": str(source.published.path.resolve()),
            "step": source.name,
            "kind": source.kind,
            "fingerprint": source.fingerprint,
            "config": source.config.model_dump(),
            "metrics": source.published.manifest["metrics"],
            "inputs": {name: self._input(inner) for name, inner in source.inputs.items()},
        }

    def _publish(self, work: Running, metrics: dict[str, Any], seconds: float) -> None:
        step = work.step
        manifest = {
            "step": step.name,
            "kind": step.kind,
            "fingerprint": step.fingerprint,
            "config": step.config.model_dump(),
            "inputs": inputs_of(step, self.plan),
            "metrics": metrics,
            "environment": environment(),
            "started": work.started,
            "seconds": seconds,
        }
        step.published = self.store.publish(work.job.folder / "out", manifest)

    def _note(self, step: Step, state: str, seconds: float | None = None, error: str | None = None) -> None:
        path = step.published.path if step.published else None
        self.outcome[step.name] = {
            "step": step.name,
            "kind": step.kind,
            "state": state,
            "fingerprint": step.fingerprint,
            "path": os.path.relpath(path, self.runs) if path else None,
            "seconds": seconds,
            "error": error,
        }
        link = self.folder / _file_name(step.name)
        if path:
            _link(link, path)
        elif link.is_symlink():
            link.unlink()  # it leads to an older result, of other settings

    def _record(self, status: str) -> None:
        """Write run.json: the state of every step, in the plan's order."""
        steps = [self.outcome[step.name] for step in self.plan.steps if step.name in self.outcome]
        write_json(self.folder / "run.json", {"recipe": self.plan.recipe.name, "status": status, "steps": steps})


def reports_of(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """The step name and metrics of every report that is made, and of what the plan's results are now."""
    made = [step for step in plan.steps if step.config.makes == "report" and step.published]
    stale = {step.name for step in plan.steps if step.published is None or changed_input(step)}
    return [
        (step.name, step.published.manifest["metrics"])
        for step in made
        if step.published and not stale & {step.name, *below(step)}
    ]


def run_record(runs: Path, recipe: str) -> dict[str, Any]:
    """The last run.json of a recipe."""
    return json.loads((runs / recipe / "run.json").read_text(encoding="utf-8"))


def _file_name(step: str) -> str:
    """A step's name as one file name: models found by reference have slashes in theirs, and any length."""
    return file_name(step)


def _link(link: Path, target: Path) -> None:
    """Let `link` lead to `target`, relative, whatever it was before."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    temporary.replace(link)
