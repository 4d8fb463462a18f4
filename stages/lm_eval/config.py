"""The `lm_eval` section of a recipe: which models, which tasks, under which settings.

Light on purpose: imports no torch and no lm_eval.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.base import Config, Need, UserError, wrong_at
from stages.data.files import read_rows
from stages.evaluation.config import EvaluationStage, repeated, require_vllm
from stages.library_options.option_models import Options as LibraryOptions
from stages.library_options.option_models import options as library_options
from stages.models.model_folder import REMOTE_CODE, check_context, check_model
from stages.system.module_command import module_command
from stages.training.launch import Launch

if TYPE_CHECKING:
    GenerationOptions = LibraryOptions
else:
    GenerationOptions = library_options("gen_kwargs")

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffix -> the `datasets` loader that reads it."""


_OWN_CODE = re.compile(r"!function|__")
"""What a task file holds that calls Python: by name, or by the inner names of objects in a template."""


def loader_of(reference: str) -> str | None:
    """The `datasets` loader for a file reference, or None when its suffix is not one we read."""
    name = reference.partition("@sha256:")[0]
    return LOADERS.get(PurePosixPath(name).suffix.lower())


class Task(Config):
    """One benchmark: a task, group or tag of lm-eval, or of the folder `include_path`."""

    task: str = Field(min_length=1)
    """The name lm-eval knows it by."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Worked examples before each question; None takes the task's own number."""
    metric: str | None = None
    """The report's headline, `acc` or with its filter `exact_match,strict-match`; None takes the first."""
    data: dict[str, str] = Field(default_factory=dict)
    """Split name -> file, instead of the data set the task names: for one's own items, or with no hub."""
    dataset: str | None = None
    """A folder that holds a copy of the task's data set, or ORG/NAME@REVISION on the hub, instead of the one the task
    names: with no hub, or for one revision. Of a group or tag, for all its tasks."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.data and self.dataset is not None:
            raise wrong_at("dataset", "excludes data; name single files or a whole data set")
        return self

    @field_validator("data")
    @classmethod
    def _one_readable_format(cls, data: dict[str, str]) -> dict[str, str]:
        for split, reference in data.items():
            if not re.fullmatch(r"\w{1,50}", split):
                raise ValueError(f"{split!r} is no name of a split; use up to 50 letters, digits and _")
            if loader_of(reference) is None:
                endings = ", ".join(LOADERS)
                text = f"{reference!r} should be a file ending in {endings}, so that it is clear how to read it"
                raise wrong_at(split, text)
        formats = {split: loader_of(reference) for split, reference in data.items()}
        if len(set(formats.values())) > 1:
            raise ValueError(f"all splits of a task need one file format, not {formats}")
        return data


class Options(Config):
    """How the models are asked: what moves a score, or the speed. Defaults are lm-eval's command's."""

    backend: Literal["hf", "vllm"] = "hf"
    """What runs the model: transformers, or vLLM on GPUs (`pip install -e '.[vllm]'`). Where the stage's `resources`
    name several GPUs and there is one process, the model is split over them."""

    apply_chat_template: bool = False
    """Wrap each question in the tokenizer's chat template; for a tuned model, as it was trained."""
    fewshot_as_multiturn: bool | None = None
    """Worked examples as turns of a conversation; None: exactly when the chat template is applied."""
    system_instruction: str | None = None
    """A system message before every question."""
    batch_size: int = Field(default=1, ge=1)
    """Requests computed together; moves the speed, not the scores (beyond rounding in 16 bits)."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many items of each task: for a trial, never for a score to report."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is that of the checkpoint."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens, older text cut on the left; None asks the model's config."""
    gen_kwargs: GenerationOptions = Field(default_factory=GenerationOptions)
    """Laid over each task's own: until, max_gen_toks, and fields of transformers' GenerationConfig."""
    bootstrap_iters: int = Field(default=100_000, ge=0)
    """Resamples for standard errors of metrics that are no plain mean; 0 leaves out every standard error."""
    log_samples: bool = True
    """Keep every question and answer; the report's paired standard errors come from them."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute what the model wrote, such as humaneval: it can do on this machine whatever you can."""

    @model_validator(mode="after")
    def _multiturn_needs_a_template(self) -> Self:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn: true needs apply_chat_template: true, which gives the turns")
        return self

    @property
    def multiturn(self) -> bool:
        """`fewshot_as_multiturn`, decided."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


class LMEvalStage(EvaluationStage):
    """Benchmarks through lm-evaluation-harness."""

    kind: ClassVar[str] = "lm_eval"
    version: ClassVar[int] = 1

    tasks: list[Task] = Field(min_length=1)
    """Benchmarks: tasks, groups or tags of lm-eval, or of the folder `include_path`."""
    include_path: str | None = None
    """A folder of one's own task files. Their Python functions and templates run: include only what you trust."""
    options: Options = Options()
    launch: Launch | None = None
    """Options of `accelerate launch`, to evaluate in several processes, each with a copy of the model and a part of
    the items. Absent: one. Worked examples that a task draws at random are drawn by each process for its own items."""
    seed: int | None = None
    """For few-shot draws and sampling; None takes lm-eval's own seeds."""

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: list[Task]) -> list[Task]:
        if found := repeated([task.task for task in tasks]):
            raise ValueError(
                f"named more than once: {', '.join(found)}; for other settings of a task, add another lm_eval stage"
            )
        return tasks

    @model_validator(mode="after")
    def _processes_fit(self) -> Self:
        if self.launch is not None and self.launch.sharding:
            raise wrong_at(
                f"launch.{self.launch.sharding}", "splits a model for training; raise resources.gpus instead"
            )
        if self.launch is not None and self.options.backend == "vllm":
            raise wrong_at("launch", "is for the backend hf; vllm uses as many GPUs as resources.gpus says by itself")
        return self

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        """The harness, which defines the tasks."""
        return ("lm_eval",)

    @property
    def processes(self) -> int:
        """How many processes a step of this stage runs in on this machine."""
        return 1 if self.launch is None else self.launch.processes_per_machine

    def needs(self) -> dict[str, Need]:
        """The models, and every file."""
        needs = super().needs()
        if self.include_path is not None:
            needs["include_path"] = Need("data", self.include_path, "include_path")
        for i, task in enumerate(self.tasks):
            if task.dataset is not None:
                needs[dataset_key(task)] = Need("data", task.dataset, f"tasks.{i}.dataset")
            for split, reference in task.data.items():
                needs[data_key(task, split)] = Need("data", reference, f"tasks.{i}.data.{split}")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Whether lm-eval, or `include_path`, knows every task and may run it, every file of `data` can be read, and
        the model be loaded."""
        for name, path in files.items():
            if name.startswith("data."):
                _require_rows(path)
        include = files.get("include_path")
        own = _names_in(include) if include else set()
        asked = tuple(task.task for task in self.tasks if task.task not in own)
        if not self.options.confirm_run_unsafe_code and any("unsafe_code" in text for text in _texts(include)):
            asked = tuple(task.task for task in self.tasks)
        for i, task in enumerate(self.tasks):
            if task.dataset is not None and not files[dataset_key(task)].is_dir():
                raise UserError(f"{task.dataset} is a file; name files under data", f"tasks.{i}.dataset")
        refused = _refused_by_lm_eval(asked, include, self.options.confirm_run_unsafe_code) if asked else {}
        for i, task in enumerate(self.tasks):
            if task.task in refused:
                raise UserError(refused[task.task], key=f"tasks.{i}.task")
        check_model(files["model"], self.trust_remote_code, "models")
        check_context(files["model"], self.options.max_length, "options.max_length")
        require_vllm(self.options.backend)

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's, what the model writes, and that of one's own tasks."""
        found = [REMOTE_CODE] if self.trust_remote_code else []
        if self.options.confirm_run_unsafe_code:
            found.append("options.confirm_run_unsafe_code: code that the model writes runs")
        include = files.get("include_path")
        if include and (any(include.rglob("*.py")) or any(map(_OWN_CODE.search, _texts(include)))):
            found.append(f"include_path: Python of the tasks in {self.include_path} runs")
        return found


@cache
def _require_rows(path: Path) -> None:
    """Read a file to its end, once for all the models that are asked what stands in it. Raises UserError."""
    for _ in read_rows(path):
        pass


def data_key(task: Task, split: str) -> str:
    """The name under which a task's file is found in `context.inputs`."""
    return f"data.{task.task}.{split}"


def dataset_key(task: Task) -> str:
    """The name under which a task's whole data set is found in `context.inputs`."""
    return f"dataset.{task.task}"


def _names_in(folder: Path) -> set[str]:
    """The tasks and groups that the YAML files of `folder` define; read as text, for their functions are not run."""
    pattern = re.compile(r"^(?:task|group): *['\"]?([^\s'\"]+)", re.MULTILINE)
    return {name for text in _texts(folder) for name in pattern.findall(text)}


def _texts(folder: Path | None) -> Iterator[str]:
    """The YAML files of `folder`."""
    for file in sorted(folder.rglob("*.yaml")) if folder else ():
        yield file.read_text(encoding="utf-8", errors="replace")


@cache
def _refused_by_lm_eval(names: tuple[str, ...], include: Path | None, unsafe: bool) -> dict[str, str]:
    """What is to be said of the names that lm-eval does not know, or may not run where `unsafe` is not confirmed;
    asked in a process of its own, for it takes long."""
    call, environment = module_command("stages.lm_eval.tasks", str(include or ""), "unsafe" if unsafe else "", *names)
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"lm-eval cannot list its tasks: {done.stderr.strip().splitlines()[-1:]}", key="tasks")
    return json.loads(done.stdout.splitlines()[-1])
