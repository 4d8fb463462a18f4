"""Load a recipe's benchmarks as lm-eval's task objects and check them before the model is loaded."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import Task as LMTask
from lm_eval.tasks import TaskManager

from stages.base import UserError
from stages.library_options.option_models import CODE_OPTIONS
from stages.lm_eval.config import LMEvalStage, Task
from stages.lm_eval.local_data import parquet_of_files, parquet_of_folder
from stages.system.did_you_mean import similar
from stages.system.file_names import file_name


@dataclass(frozen=True)
class Benchmark:
    """One entry of the recipe's `tasks` with its lm-eval objects."""

    config: Task
    parts: list[LMTask | Group]
    """One task or group, or the tasks of a tag."""
    tasks: dict[str, LMTask]
    """Every task by name, those inside groups included."""
    groups: dict[str, Group]

    @property
    def headlines(self) -> list[str]:
        """Names of the scores in the report's main table: a group with an aggregate score, else its tasks."""
        scored = [
            part.name if isinstance(part, Group) else part.task_name
            for part in self.parts
            if not isinstance(part, Group) or part.has_aggregation
        ]
        return scored or list(self.tasks)


def load_benchmarks(
    config: LMEvalStage,
    files: Mapping[str, Path],
    scratch: Path,
    part: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> list[Benchmark]:
    """Load and check every benchmark of the recipe.

    Args:
        config: the stage.
        files: path of each input.
        scratch: folder for generated task files.
        part: creates the context in which the task of that name is loaded and checked.

    Raises:
        UserError: if a benchmark cannot be used.
    """
    manager = _manager(config, files.get("include_path"))
    allow_unsafe = config.options.confirm_run_unsafe_code
    benchmarks = []
    for i, task in enumerate(config.tasks):
        with part(f"task {task.task}"):
            _check_name(manager, task.task, f"tasks.{i}.task", allow_unsafe)
            benchmark = _load(manager, i, task, files, scratch)
            _set_split(benchmark, f"tasks.{i}.split")
            _set_num_fewshot(benchmark, f"tasks.{i}.num_fewshot")
            _check_metric(benchmark, f"tasks.{i}.metric")
            _check_safe(benchmark, f"tasks.{i}.task", allow_unsafe)
            benchmarks.append(benchmark)
    entries: dict[str, str] = {}
    for i, benchmark in enumerate(benchmarks):
        for name in benchmark.tasks:  # lm-eval would score it once, with the settings of one of the two
            if name in entries:
                text = f"{name} is in {entries[name]} and in {benchmark.config.task}; keep one of the two"
                raise UserError(text, f"tasks.{i}.task")
        entries |= dict.fromkeys(benchmark.tasks, benchmark.config.task)
    return benchmarks


def _manager(config: LMEvalStage, include: Path | None) -> TaskManager:
    """Read lm-eval's own 14,000 task files only if the recipe's folder does not define every task: it takes seconds."""
    names = [task.task for task in config.tasks]
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not all(name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=str(include) if include else None)
    return manager


_UNSAFE = (
    "{} runs code that the model wrote, which can do on this machine whatever you can do; to allow it, set"
    " options.confirm_run_unsafe_code: true on the stage"
)


def _check_name(manager: TaskManager, name: str, key: str, allow_unsafe: bool) -> None:
    """Raise UserError for a name that does not exist or needs `allow_unsafe`. Imports no Python of a task."""
    if name not in manager.all_tasks:
        matches = similar(name, manager.all_tasks)
        hint = f"did you mean {', '.join(matches)}?" if matches else "`lm_eval ls tasks` lists them"
        raise UserError(f"lm-eval knows no task, group or tag {name!r}; {hint}", key)
    if not allow_unsafe and _is_unsafe(manager, name):
        raise UserError(_UNSAFE.format(name), key)


def _is_unsafe(manager: TaskManager, name: str) -> bool:
    """Whether `unsafe_code` is set for a task, or for any task of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    group_members = config.get("task")
    members = [*(group_members if isinstance(group_members, list) else ()), *(() if entry.yaml_path else entry.tags)]
    names = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in members]
    return bool(config.get("unsafe_code")) or any(_is_unsafe(manager, str(member)) for member in names)


def _load(manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path) -> Benchmark:
    if task.data:
        specs = [_with_own_data(manager, index, task, files, scratch)]
    elif task.dataset is not None:
        specs = _with_own_dataset(manager, index, task, files, scratch)
    else:
        specs = [task.task]
    try:
        loaded = manager.load(specs)
    except Exception as error:  # a task file, its Python and datasets raise anything
        raise UserError(
            f"{task.task} cannot be loaded: {error}. Without a network, set `data: {{split: file}}`, or"
            " `dataset: folder` with a copy of its data set",
            f"tasks.{index}.task",
        ) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    nested = {name for group in groups.values() for name in group.child_names}
    parts: list[LMTask | Group] = [group for name, group in groups.items() if name not in nested]
    parts += [lm_task for name, lm_task in tasks.items() if name not in nested]
    return Benchmark(task, parts, tasks, groups)


def _with_own_data(manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path) -> str:
    """Write a task file that includes the original and reads the recipe's files; return its path."""
    key = f"tasks.{index}.data"
    entry = manager.task_index[task.task]
    config = entry.cfg or {}
    if task.task not in manager.all_subtasks or entry.yaml_path is None or "class" in config:
        raise UserError(f"{task.task} is a group, a tag or a Python task, whose data cannot be replaced", key)
    scored_split, fewshot_split = _splits(config, task)
    if missing := {split for split in (scored_split, fewshot_split) if split} - task.data.keys():
        raise UserError(f"{task.task} reads the split {' and '.join(sorted(missing))} too; name a file for it", key)
    own_files = {split: files[f"data.{task.task}.{split}"] for split in task.data}
    override = {
        "include": str(entry.yaml_path),
        "task": task.task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": parquet_of_files(own_files, scratch / "items" / f"{index}"),
            # datasets keys its shared cache by path and time stamp, so it could return a file's old content.
            "cache_dir": str(scratch / "datasets"),
        },
    }
    if not _num_fewshot(config, task) and not config.get("fewshot_config"):
        override["fewshot_split"] = scored_split  # lm-eval loads this split even without few-shot examples
    return _write_task_file(override, scratch, f"{index}")


def _with_own_dataset(
    manager: TaskManager, index: int, task: Task, files: Mapping[str, Path], scratch: Path
) -> list[str]:
    """Replace the task, the group or the tag's tasks by ones that read the recipe's folder; return their names."""
    dataset = str(parquet_of_folder(files[f"dataset.{task.task}"], scratch / "items" / f"{index}").resolve())
    entry = manager.task_index[task.task]
    names = [task.task] if entry.yaml_path else sorted(entry.tags)
    for name in names:
        original = manager.task_index[name]
        if original.yaml_path is None or "class" in (original.cfg or {}):
            raise UserError(f"{name} is a Python task, whose data cannot be replaced", f"tasks.{index}.dataset")
        override = {
            "include": str(original.yaml_path),
            "group" if name in manager.all_groups else "task": name,
            "dataset_path": dataset,  # a group passes it on to all its tasks
            "dataset_kwargs": {"cache_dir": str(scratch / "datasets")},
        }
        folder = Path(_write_task_file(override, scratch, f"{index}-{name}")).parent
        manager.task_index[name] = TaskManager(include_path=folder, include_defaults=False).task_index[name]
    return names


def _write_task_file(override: dict[str, Any], scratch: Path, name: str) -> str:
    path = scratch / "tasks" / file_name(name) / "task.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(override), encoding="utf-8")
    return str(path)


def _splits(cfg: Mapping[str, Any], task: Task) -> tuple[str | None, str | None]:
    scored = cfg.get("test_split") or cfg.get("validation_split")
    if not _num_fewshot(cfg, task) or (cfg.get("fewshot_config") or {}).get("samples"):
        return scored, None
    return scored, cfg.get("fewshot_split") or cfg.get("training_split") or cfg.get("validation_split")


def _num_fewshot(cfg: Mapping[str, Any], task: Task) -> int:
    return (cfg.get("num_fewshot") if task.num_fewshot is None else task.num_fewshot) or 0


def _set_split(benchmark: Benchmark, key: str) -> None:
    split = benchmark.config.split
    for name, task in benchmark.tasks.items() if split is not None else ():
        if split == (task.config.test_split or task.config.validation_split):
            raise UserError(f"{split} is the split that {name} scores anyway; leave it out", key)
        if not isinstance(task, ConfigurableTask) or type(task).test_docs is not ConfigurableTask.test_docs:
            raise UserError(f"{name} is a Python task, whose split cannot be changed; leave it out", key)
        if split not in task.dataset:
            raise UserError(f"the data set of {name} has no split {split!r}, only {', '.join(task.dataset)}", key)
        task.set_config("test_split", split)


def _set_num_fewshot(benchmark: Benchmark, key: str) -> None:
    """Set the recipe's number like lm-eval's --num_fewshot: a task that sets 0 keeps it, as its prompt has examples."""
    num_fewshot = benchmark.config.num_fewshot
    if num_fewshot is None:
        return
    changeable = [task for task in benchmark.tasks.values() if task.get_config("num_fewshot") != 0]
    if num_fewshot and not changeable:
        raise UserError(f"the task file of {benchmark.config.task} fixes 0 few-shot examples; remove this key", key)
    for task in changeable:
        task.set_config("num_fewshot", num_fewshot)


def _check_metric(benchmark: Benchmark, key: str) -> None:
    if benchmark.config.metric is None:
        return
    metric = benchmark.config.metric.partition(",")[0]
    for name in benchmark.headlines:
        reported = list(benchmark.tasks[name].aggregation()) if name in benchmark.tasks else []
        if name in benchmark.groups:
            reported = list(dict.fromkeys(m.metric for m in benchmark.groups[name].aggregate_metric_list or []))
        if metric not in reported:
            raise UserError(f"{name} reports no {metric!r}, only {', '.join(reported)}", key)


def _check_safe(benchmark: Benchmark, key: str, allow_unsafe: bool) -> None:
    for name, task in benchmark.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not allow_unsafe:  # lm-eval sets it only if it is true
            raise UserError(_UNSAFE.format(name), key)
        if settings := [setting for setting in CODE_OPTIONS if setting in (task.config.generation_kwargs or {})]:
            raise UserError(f"{name} sets {settings[0]}, which would run third-party code; remove it", key)
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name} needs images or audio; this stage evaluates text models", key)
