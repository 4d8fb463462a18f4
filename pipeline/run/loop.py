"""Runs the steps of a plan that have no usable result, several at once where there is room, and publishes their
results."""

import bisect
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path

from filelock import BaseFileLock, Timeout

from pipeline.console.console import Console
from pipeline.plan.cache import Decisions, cached_results, changed_input, input_records
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, steps_to_run
from pipeline.plan.step import Plan, Step
from pipeline.run.executor import Event, Executor
from pipeline.run.job import Job, StepResult
from pipeline.run.record_writer import RecordWriter
from pipeline.store.provenance import environment
from pipeline.store.references import Reference, display_name
from pipeline.store.store import Published, Store
from stages.base import Input, Resources
from stages.records.manifest import MANIFEST, Manifest
from stages.records.run_record import Progress, StepRecord
from stages.system.file_names import file_name
from stages.system.locks import holder, sign
from stages.system.os_errors import explain_os_error
from stages.system.secrets import mask_secrets

POLL_SECONDS = 0.5
"""Interval between looks for a result that another run is computing."""
LOGS = "logs"
"""The folder of the steps' output, in the run's folder."""


WITHOUT_GPU = Resources(gpus=0)
"""The least that a step takes."""


@dataclass(frozen=True)
class _RunningStep:
    """A step whose worker is at work."""

    step: Step
    job: Job
    lock: BaseFileLock
    """Held until the step is published or has failed."""
    start: float
    """On the monotonic clock, in seconds."""
    started: str
    """Time of day, ISO 8601, UTC."""

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)


class Run:
    """One run of a plan; `resolver` has fetched the references of all steps that run."""

    def __init__(
        self,
        plan: Plan,
        selection: Selection,
        decisions: Decisions,
        store: Store,
        resolver: Resolver,
        console: Console,
        gpu_memory: Mapping[str, int],
    ) -> None:
        self.plan, self.selection, self.decisions = plan, selection, dict(decisions)
        self.store, self.resolver, self.console = store, resolver, console
        self.folder = resolver.runs / plan.recipe.name
        location = plan.recipe.source_map.location
        recipe_file = os.path.relpath(location.file, resolver.runs.absolute().parent)
        self.record = RecordWriter(self.folder, plan.recipe.name, recipe_file)
        self.results: dict[str, Published] = cached_results(decisions)
        """Step -> its result, for steps that have one by now."""
        self._steps = {step.name: step for step in plan.steps}
        self._position = {name: index for index, name in enumerate(self._steps)}
        self._unsettled: TopologicalSorter[str] = TopologicalSorter(
            {step.name: [source.name for source in step.dependencies] for step in plan.steps}
        )
        self._ready: list[str] = []
        """Steps that can start, in the order of the plan."""
        self._running: dict[str, _RunningStep] = {}
        self._completed_now: set[str] = set()
        """Steps whose results appeared during this run."""
        self._gpu_memory = gpu_memory
        """Step -> bytes of a GPU that it needs by its estimate, where that is known."""
        self._alone: set[str] = set()
        """Steps for which the memory of a GPU that they shared did not suffice; they get one of their own."""
        self._announced: set[str] = set()
        """Steps that another run computes, as the user knows."""
        self._blocked_by_other_run = False
        """Whether a step could start now if another run were not computing it."""

    def execute(self, executor: Executor) -> int:
        """Run all selected steps without a result.

        Returns:
            0 if all went well, 1 if a step failed.
        """
        steps = steps_to_run(self.plan, self.selection, self.decisions)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record.width = executor.width
        for step in self.plan.steps:
            self._set_state(step, "cached" if step.name in self.results else "not asked for")
        for step in steps:
            self._set_state(step, "waiting")
        self.store.clean_up_killed_runs()
        if other := self.record.taken_over_from():
            self.console.say(
                f"{self.record.recipe} was the name of {other}, whose record this run replaces; rename one"
            )
        self.record.write("running")
        if steps:
            self.console.begin(self.record.steps, self.record.width, self.folder / LOGS)
        try:
            self._run_steps(executor)
        except BaseException:
            self._interrupt(executor)
            raise
        has_failed = any(record.state == "failed" for record in self.record.steps.values())
        self.record.write("failed" if has_failed else "done")
        return 1 if has_failed else 0

    def _run_steps(self, executor: Executor) -> None:
        self._unsettled.prepare()
        self._collect_ready()
        while self._ready or self._running:
            self._start_ready(executor)
            timeout = POLL_SECONDS if self._blocked_by_other_run else self.record.seconds_until_due()
            if (self._running or self._blocked_by_other_run) and (event := executor.wait(timeout)):
                self._handle(event)
            self.record.write_if_due()
            self._collect_ready()

    def _collect_ready(self) -> None:
        """Find the steps whose dependencies are settled. Steps that cannot or need not run are settled at once."""
        while names := self._unsettled.get_ready():
            for step in map(self._steps.__getitem__, names):
                failed = [s.name for s in step.dependencies if self._state(s) in ("failed", "skipped")]
                is_waiting = self._state(step) == "waiting"
                if is_waiting and failed:
                    self._set_state(step, "skipped", error=f"needs {', '.join(failed)}")
                    self.console.skipped(step.name, failed)
                    self._unsettled.done(step.name)
                elif is_waiting or self._is_outdated(step):
                    self._add_ready(step.name)
                else:
                    self._unsettled.done(step.name)

    def _add_ready(self, name: str) -> None:
        bisect.insort(self._ready, name, key=self._position.__getitem__)

    def _is_outdated(self, step: Step) -> bool:
        """Whether a cached step has to run because a dependency got another result during this run."""
        if step.name not in self.selection.selected or self._state(step) != "cached":
            return False
        if self._completed_now.isdisjoint(source.name for source in step.dependencies):
            return False
        if not (changed := changed_input(step, self.results[step.name], self.results)):
            return False
        del self.results[step.name]
        self.decisions[step.name] = replace(
            self.decisions[step.name], cached=False, published=None, reason=f"{changed} has a new result"
        )
        self._set_state(step, "waiting")
        self.resolver.fetch([step])
        return True

    def _start_ready(self, executor: Executor) -> None:
        self._blocked_by_other_run = False
        for name in list(self._ready):
            if not executor.has_room(WITHOUT_GPU, 1):
                break
            step = self._steps[name]
            resources = self._resources(step, executor)
            if executor.has_room(resources, step.config.processes) and self._start(step, resources, executor):
                self._ready.remove(name)

    def _resources(self, step: Step, executor: Executor) -> Resources:
        """What the step takes: what its stage says, and of a GPU else what its estimate says."""
        resources, share = step.config.resources, None
        if step.name in self._alone:
            share = 1.0
        elif step.config.can_share_gpu:
            share = executor.gpu_share(self._gpu_memory.get(step.name, 0))
        return resources if share is None else resources.model_copy(update={"gpus": share})

    def _start(self, step: Step, resources: Resources, executor: Executor) -> bool:
        """Start the step, or adopt a result that has appeared since it was planned.

        Returns:
            False while another run, or another step of this run with the same fingerprint, computes it.
        """
        lock = self.store.lock(self._fingerprint(step))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._wait_for_other_run(step, holder(lock))
            return False
        sign(lock)
        try:
            if result := self._existing_result(step):
                self._adopt(step, result)
                lock.release()
                return True
            job = self._job(step, resources)
            job.write()
            executor.start(job)
        except BaseException:
            lock.release()
            raise
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._running[step.name] = _RunningStep(step, job, lock, time.monotonic(), started)
        self._set_state(step, "running")
        self.console.started(step.name, self.decisions[step.name].reason)
        return True

    def _wait_for_other_run(self, step: Step, other: str) -> None:
        self._blocked_by_other_run = True
        own = {self._fingerprint(running.step) for running in self._running.values()}
        if step.name not in self._announced and self._fingerprint(step) not in own:
            self._announced.add(step.name)
            self.console.say(f"  wait   {step.name}: another run is computing it: {other}")

    def _existing_result(self, step: Step) -> Published | None:
        """A usable result that was published since the step was planned, or that a killed run completed."""
        if step.name in self.selection.forced:
            return None
        fingerprint = self._fingerprint(step)
        result = self.store.recover(fingerprint) or self.store.find(step.kind, fingerprint)
        if result is None or changed_input(step, result, self.results) or result.damage():
            return None
        return result

    def _adopt(self, step: Step, result: Published) -> None:
        self.results[step.name] = result
        self._completed_now.add(step.name)
        self._set_state(step, "cached")
        self.console.say(f"  cached {step.name}: its result exists now")
        self._unsettled.done(step.name)

    def _job(self, step: Step, resources: Resources) -> Job:
        fingerprint = self._fingerprint(step)
        return Job(
            recipe=self.plan.recipe.name,
            step=step.name,
            kind=step.kind,
            config=step.config.model_dump(),
            inputs={name: self._input(source) for name, source in step.inputs.items()},
            folder=self.store.unfinished(fingerprint).resolve(),
            cache=(self.resolver.runs / "cache").resolve(),
            log=(self.folder / LOGS).resolve() / f"{file_name(step.name)}.txt",
            lock=Path(self.store.lock(f"{fingerprint}.worker").lock_file).resolve(),
            resources=resources,
            processes=step.config.processes,
        )

    def _input(self, source: Step | Reference) -> Input:
        if not isinstance(source, Step):
            pinned = self.resolver.pinned(source)
            path = self.resolver.paths.get(pinned)  # None for inputs of inputs that are cached
            content = self.resolver.content(source) or ""
            return Input(
                path.resolve() if path else Path(str(pinned)), fingerprint=content, reference=display_name(pinned)
            )
        result = self.results[source.name]
        return Input(
            path=result.path.resolve(),
            step=source.name,
            kind=source.kind,
            fingerprint=self._fingerprint(source),
            config=source.config.model_dump(),
            metrics=result.manifest.metrics,
            inputs={name: self._input(inner) for name, inner in source.inputs.items()},
            labels=dict(source.labels),
        )

    def _handle(self, event: Event) -> None:
        running = self._running[event.job.step]
        if isinstance(event.message, Progress):
            self._show_progress(running, event.message)
            return
        del self._running[running.step.name]
        result, step = event.message, running.step
        if result.gpu_was_full and 0 < (running.job.resources.gpus or 0) < 1:
            self._run_alone(running)
            return
        error = mask_secrets(result.error or "") or self.resolver.changed_file(step)
        read = [running.job.folder, *(source.path for source in running.job.inputs.values() if source.step)]
        if deleted := next((path for path in read if not path.is_dir()), None):
            error = f"{deleted} was deleted while the step ran; run the command again, which computes what is missing"
        if error is None:
            try:
                self._publish(running, result)
            except OSError as os_error:
                error = explain_os_error(os_error, running.job.folder) or f"its result cannot be published: {os_error}"
        self._release(running)
        self._unsettled.done(step.name)
        self._set_state(step, "failed" if error else "done", running.seconds, error)
        if error:
            self.console.failed(step.name, error, running.job.log, result.is_user_error or bool(deleted))
        else:
            self.console.finished(step.name, result.metrics.notes if result.metrics else [])

    def _run_alone(self, running: _RunningStep) -> None:
        """Let a step that shared a GPU start again, with what it has saved, when it can have one of its own."""
        name = running.step.name
        self._alone.add(name)
        self._release(running)
        self._set_state(running.step, "waiting")
        self.console.say(f"  again  {name}: the GPU that it shared ran out of memory; it runs again on one of its own")
        self._add_ready(name)

    def _show_progress(self, running: _RunningStep, progress: Progress) -> None:
        name = running.step.name
        self.record.update(replace(self.record.steps[name], seconds=running.seconds, progress=progress))
        self.console.progress(name, progress)

    def _publish(self, running: _RunningStep, result: StepResult) -> None:
        """Publish what the step's worker left. Raises OSError."""
        step = running.step
        assert result.metrics is not None
        assert result.outputs is not None
        manifest = Manifest(
            step=step.name,
            kind=step.kind,
            recipe=self.plan.recipe.name,
            version=step.config.version,
            fingerprint=self._fingerprint(step),
            config=step.config.model_dump(),
            inputs=input_records(step, self.decisions, self.results, self.resolver),
            metrics=result.metrics,
            environment={**environment(), **(result.machine or {})},
            started=running.started,
            seconds=running.seconds,
            outputs=dict(result.outputs),
        )
        self.results[step.name] = self.store.publish(running.job.folder / "out", manifest)
        self._completed_now.add(step.name)

    def _release(self, running: _RunningStep) -> None:
        self.store.clean_up(self._fingerprint(running.step))
        running.lock.release()
        self.console.ended(running.step.name)

    def _interrupt(self, executor: Executor) -> None:
        """Stop all workers; keep what the next run needs to continue."""
        executor.stop()
        with contextlib.suppress(OSError):  # a full disk may be the reason for the interruption
            for running in self._running.values():
                self._release(running)
                self._set_state(running.step, "interrupted")
            self.record.write("interrupted")

    def _fingerprint(self, step: Step) -> str:
        fingerprint = self.decisions[step.name].fingerprint
        assert fingerprint is not None, "all references are resolved before a run"
        return fingerprint

    def _state(self, step: Step) -> str:
        return self.record.steps[step.name].state

    def _set_state(self, step: Step, state: str, seconds: float | None = None, error: str | None = None) -> None:
        """Record a step's state, and let its link in the run's folder point to its result."""
        result = self.results.get(step.name)
        self.record.update(
            StepRecord(
                step=step.name,
                kind=step.kind,
                labels=dict(step.labels),
                state=state,
                fingerprint=self.decisions[step.name].fingerprint,
                path=os.path.relpath(result.path, self.resolver.runs) if result else None,
                seconds=seconds,
                error=error,
            )
        )
        _link(self.folder / file_name(step.name), result.path if result else None)


def _link(link: Path, target: Path | None) -> None:
    """Let `link` point to `target` by a relative path; without one, remove it: it points to an older result.

    Raises OSError. A copy of that very result, as `cp -L` leaves it, stays.
    """
    if link.is_dir() and not link.is_symlink():
        manifests = [
            (folder / MANIFEST).read_bytes() for folder in (link, target) if folder and (folder / MANIFEST).is_file()
        ]
        if len(manifests) == 2 and manifests[0] == manifests[1]:
            return
        text = "is a folder where a link to a result belongs, as in copies by cp -L; delete it (cp -a copies links)"
        raise OSError(f"{link} {text}")
    if target is None:
        link.unlink(missing_ok=True)
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    temporary.replace(link)
