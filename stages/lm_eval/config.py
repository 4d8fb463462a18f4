"""The `lm_eval` section of a recipe: which models, which tasks, under which settings.

Light on purpose: imports no torch and no lm_eval.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.base import BadInput, Config, Need, StageConfig, wrong_at
from stages.files import read_rows
from stages.model_files import REMOTE_CODE, check_model
from stages.options import Options as LibraryOptions
from stages.options import options as library_options
from stages.process import module_call

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


class LMEvalStage(StageConfig):
    """Benchmarks; one step per model, so that a model once measured is never measured again."""

    kind: ClassVar[str] = "lm_eval"
    makes: ClassVar[Literal["scores"]] = "scores"
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.lm_eval.stage:run"

    models: list[str] = Field(min_length=1)
    """Names of stages, `base`, or references to models."""
    tasks: list[Task] = Field(min_length=1)
    include_path: str | None = None
    """A folder of one's own task files. Their Python functions and templates run: include only what you trust."""
    options: Options = Options()
    trust_remote_code: bool = False
    """Run the Python files that come with a model, for one that transformers does not know, and metrics that evaluate
    loads from the hub: they can do on this machine whatever you can do."""
    seed: int | None = None
    """For few-shot draws and sampling; None takes lm-eval's own seeds."""

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: list[str]) -> list[str]:
        if repeated := _repeated(models):
            raise ValueError(f"named more than once: {', '.join(repeated)}")
        return models

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: list[Task]) -> list[Task]:
        if repeated := _repeated([task.task for task in tasks]):
            raise ValueError(
                f"named more than once: {', '.join(repeated)}; for other settings of a task, add another lm_eval stage"
            )
        return tasks

    def needs(self) -> dict[str, Need]:
        """The model under `model` (further ones, before the split, under `model.1` ...), and every file."""
        needs = {
            "model" if i == 0 else f"model.{i}": Need("model", model, f"models.{i}", self.trust_remote_code)
            for i, model in enumerate(self.models)
        }
        if self.include_path is not None:
            needs["include_path"] = Need("data", self.include_path, "include_path")
        for i, task in enumerate(self.tasks):
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
        refused = _refused_by_lm_eval(asked, include, self.options.confirm_run_unsafe_code) if asked else {}
        for i, task in enumerate(self.tasks):
            if task.task in refused:
                raise BadInput(refused[task.task], key=f"tasks.{i}.task")
        check_model(files["model"], self.trust_remote_code, "models")

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's, what the model writes, and that of one's own tasks."""
        found = [REMOTE_CODE] if self.trust_remote_code else []
        if self.options.confirm_run_unsafe_code:
            found.append("options.confirm_run_unsafe_code: code that the model writes runs")
        include = files.get("include_path")
        if include and (any(include.rglob("*.py")) or any(map(_OWN_CODE.search, _texts(include)))):
            found.append(f"include_path: Python of the tasks in {self.include_path} runs")
        return found

    def split(self) -> dict[str, Self]:
        """One step per model."""
        return {f"[{model}]": self.model_copy(update={"models": [model]}) for model in self.models}


@cache
def _require_rows(path: Path) -> None:
    """Read a file to its end, once for all the models that are asked what stands in it. Raises BadInput."""
    for _ in read_rows(path):
        pass


def data_key(task: Task, split: str) -> str:
    """The name under which a task's file is found in `context.inputs`."""
    return f"data.{task.task}.{split}"


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
    call, environment = module_call("stages.lm_eval.tasks", str(include or ""), "unsafe" if unsafe else "", *names)
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BadInput(f"lm-eval cannot list its tasks: {done.stderr.strip().splitlines()[-1:]}", key="tasks")
    return json.loads(done.stdout.splitlines()[-1])


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
