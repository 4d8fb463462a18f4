"""A recipe's tasks -> lm-eval's task objects, checked as far as can be before a model is loaded."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task as LMTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from stages.base import UserError
from stages.library_options.option_models import CODE_OPTIONS
from stages.lm_eval.config import LMEvalStage, Task, data_key, dataset_key, loader_of
from stages.system.file_names import file_name


@dataclass(frozen=True)
class Benchmark:
    """One entry of the recipe's `tasks` and what lm-eval made of it."""

    config: Task
    parts: list[LMTask | Group]
    """One task or group; several tasks for a tag."""
    tasks: dict[str, LMTask]
    """Every single task, those inside groups too."""
    groups: dict[str, Group]

    @property
    def headlines(self) -> list[str]:
        """The names whose metric heads the report: a group that has a score of its own, else its tasks."""
        scored = [
            part.name if isinstance(part, Group) else part.task_name
            for part in self.parts
            if not isinstance(part, Group) or part.has_aggregation
        ]
        return scored or list(self.tasks)

    def metrics_of(self, name: str) -> list[str]:
        """The metrics that a task or group of this benchmark reports, in lm-eval's order."""
        if name in self.groups:
            return list(dict.fromkeys(m.metric for m in self.groups[name].aggregate_metric_list or []))
        return list(self.tasks[name].aggregation())


def load_benchmarks(config: LMEvalStage, files: Mapping[str, Path], scratch: Path) -> list[Benchmark]:
    """Build every task of the recipe.

    `files` are the step's inputs by name. Raises UserError for an unknown task, data that cannot be had, a
    headline metric the task does not report, or settings it cannot follow.
    """
    manager = _manager(config, files.get("include_path"))
    benchmarks = [_load(manager, i, task, files, scratch) for i, task in enumerate(config.tasks)]
    for i, benchmark in enumerate(benchmarks):
        _set_shots(benchmark, f"tasks.{i}.num_fewshot")
        _check_metric(benchmark, f"tasks.{i}.metric")
        _check_safe(benchmark, f"tasks.{i}.task", config.options.confirm_run_unsafe_code)
    try:
        manager.load([part for benchmark in benchmarks for part in benchmark.parts])
    except ValueError as error:  # a task asked for by itself and inside a group
        raise UserError(f"tasks: {error}; keep one of the two") from error
    return benchmarks


def _manager(config: LMEvalStage, include: Path | None) -> TaskManager:
    """lm-eval's own 14,000 task files take seconds to read: only if the recipe's folder lacks a task."""
    names = [task.task for task in config.tasks]
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not all(name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=str(include) if include else None)
    refused = refused_names(manager, names, config.options.confirm_run_unsafe_code)
    for i, name in enumerate(names):
        if name in refused:
            raise UserError(f"tasks.{i}.task: {refused[name]}")
    return manager


UNSAFE = (
    "{} runs code that the model wrote, which can do on this machine whatever you can do; to allow it, set"
    " options.confirm_run_unsafe_code: true on the stage"
)


def refused_names(manager: TaskManager, names: list[str], unsafe: bool) -> dict[str, str]:
    """What is to be said of those of `names` that are no task, group or tag, or that need `unsafe`."""
    said = {}
    for name in names:
        if name in manager.all_tasks and not unsafe and _is_unsafe(manager, name):
            said[name] = UNSAFE.format(name)  # known before its own Python is imported
        elif name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            said[name] = f"lm-eval knows no task, group or tag {name!r}; {hint}"
    return said


def _is_unsafe(manager: TaskManager, name: str) -> bool:
    """Whether a task's file, or that of one in a group or tag, is marked `unsafe_code`."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    listed = config.get("task")
    members = [*(listed if isinstance(listed, list) else ()), *(() if entry.yaml_path else entry.tags)]
    names = [part if isinstance(part, str) else part.get("task") or part.get("group") for part in members]
    return bool(config.get("unsafe_code")) or any(_is_unsafe(manager, str(part)) for part in names)


def _load(manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path) -> Benchmark:
    if task.data:
        specs = [_with_own_data(manager, index, task, files, scratch)]
    elif task.dataset is not None:
        specs = _with_own_dataset(manager, index, task, files, scratch)
    else:
        specs = [task.task]
    try:
        loaded = manager.load(specs)
    except (OSError, ModuleNotFoundError) as error:  # datasets' hub and file errors are OSErrors
        raise UserError(
            f"tasks.{index}.task: {task.task} cannot be loaded: {error}. "
            "Without a network, give its items with `data: {split: file}`, or a copy of its data set with"
            " `dataset: folder`"
        ) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    nested = {name for group in groups.values() for name in group.child_names}
    parts: list[LMTask | Group] = [group for name, group in groups.items() if name not in nested]
    parts += [single for name, single in tasks.items() if name not in nested]
    return Benchmark(task, parts, tasks, groups)


def _with_own_data(manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path) -> str:
    """A task file that includes the original and reads the recipe's files; returns its path."""
    where = f"tasks.{index}.data"
    entry = manager.task_index[task.task]
    if task.task not in manager.all_subtasks or entry.yaml_path is None or "class" in (entry.cfg or {}):
        raise UserError(f"{where}: {task.task} is a group, a tag or a task written in Python; its data is its own")
    scored, examples = _splits_read(entry.cfg or {}, task)
    if missing := {split for split in (scored, examples) if split} - task.data.keys():
        raise UserError(f"{where}: {task.task} reads the split {' and '.join(sorted(missing))} too; give a file for it")
    override = {
        "include": str(entry.yaml_path),
        "task": task.task,
        "dataset_path": loader_of(next(iter(task.data.values()))),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(files[data_key(task, split)].resolve()) for split in task.data},
            # The shared cache goes by path and time stamp, and could serve what a file held before.
            "cache_dir": str(scratch / "datasets"),
        },
    }
    if not _shots(entry.cfg or {}, task) and not (entry.cfg or {}).get("fewshot_config"):
        override["fewshot_split"] = scored  # lm-eval reads one though it shows no example
    return _written(override, scratch, f"{index}")


def _with_own_dataset(
    manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path
) -> list[str]:
    """Put in the place of the task, group or tag's tasks ones that read the recipe's folder; returns their names."""
    folder = str(files[dataset_key(task)].resolve())
    entry = manager.task_index[task.task]
    names = [task.task] if entry.yaml_path else sorted(entry.tags)
    for name in names:
        found = manager.task_index[name]
        if found.yaml_path is None or "class" in (found.cfg or {}):
            raise UserError(f"tasks.{index}.dataset: {name} is written in Python; its data is its own")
        override = {
            "include": str(found.yaml_path),
            "group" if name in manager.all_groups else "task": name,
            "dataset_path": folder,  # in a group's file, that of all its tasks
            "dataset_kwargs": {"cache_dir": str(scratch / "datasets")},
        }
        written = Path(_written(override, scratch, f"{index}-{name}"))
        manager.task_index.update({name: TaskIndex.build([written.parent])[name]})
    return names


def _written(override: dict[str, Any], scratch: Path, name: str) -> str:
    path = scratch / "tasks" / file_name(name) / "task.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(override), encoding="utf-8")
    return str(path)


def _splits_read(cfg: Mapping[str, Any], task: Task) -> tuple[str | None, str | None]:
    """The split that is scored and, with worked examples, the one they come from."""
    scored = cfg.get("test_split") or cfg.get("validation_split")
    if not _shots(cfg, task) or (cfg.get("fewshot_config") or {}).get("samples"):
        return scored, None
    return scored, cfg.get("fewshot_split") or cfg.get("training_split") or cfg.get("validation_split")


def _shots(cfg: Mapping[str, Any], task: Task) -> int:
    """How many worked examples are shown."""
    return (cfg.get("num_fewshot") if task.num_fewshot is None else task.num_fewshot) or 0


def _set_shots(benchmark: Benchmark, where: str) -> None:
    """As lm-eval's --num_fewshot: a task whose file fixes 0 (its prompt holds examples already) keeps 0."""
    shots = benchmark.config.num_fewshot
    if shots is None:
        return
    free = [task for task in benchmark.tasks.values() if task.get_config("num_fewshot") != 0]
    if shots and not free:
        raise UserError(f"{where}: {benchmark.config.task} fixes 0 worked examples in its own file; leave this out")
    for task in free:
        task.set_config("num_fewshot", shots)


def _check_metric(benchmark: Benchmark, where: str) -> None:
    if benchmark.config.metric is None:
        return
    metric = benchmark.config.metric.partition(",")[0]
    for name in benchmark.headlines:
        known = benchmark.metrics_of(name)
        if metric not in known:
            raise UserError(f"{where}: {name} reports no {metric!r}, only {', '.join(known)}")


def _check_safe(benchmark: Benchmark, where: str, unsafe: bool) -> None:
    for name, task in benchmark.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe:
            raise UserError(f"{where}: {UNSAFE.format(name)}")
        if found := [key for key in CODE_OPTIONS if key in (task.config.generation_kwargs or {})]:
            raise UserError(f"{where}: {name} sets {found[0]}, which would run code from elsewhere; take it out")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{where}: {name} needs pictures; this stage evaluates text models")


if __name__ == "__main__":  # INCLUDE_PATH UNSAFE NAME ...: see _refused_by_lm_eval in config.py
    print(json.dumps(refused_names(TaskManager(include_path=sys.argv[1] or None), sys.argv[3:], bool(sys.argv[2]))))
