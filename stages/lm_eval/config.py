"""The `lm_eval` section of a recipe. Imports neither torch nor lm_eval, so that planning stays fast."""

import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.base import Config, Items, Need, UserError, wrong_at
from stages.data.files import DATA_SUFFIXES, read_rows
from stages.evaluation.config import EvaluationStage, ModelOptions, require_vllm, unique_by
from stages.library_options.option_models import GenerationOptions
from stages.lm_eval.task_files import has_python, outside_files
from stages.models.model_folder import check_context, check_model
from stages.training.launch import Launch


class Task(Config):
    """One benchmark: a task, group or tag of lm-eval or of the folder `include_path`."""

    task: str = Field(min_length=1)
    """Name of a task, group or tag."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Few-shot examples in each prompt. None: the task's own number."""
    metric: str | None = None
    """The report's headline metric: `acc`, or with its filter `exact_match,strict-match`. None: the task's first."""
    data: dict[str, str] = Field(default_factory=dict)
    """Split name -> file that replaces the task's data set: for your own items, or without a network. Items reach the
    task as they are written."""
    split: str | None = Field(default=None, exclude_if=lambda split: split is None)
    """Another split of the task's data set, whose items are scored instead of those of the task's own split."""
    dataset: str | None = None
    """A folder, or ORG/NAME@REVISION on the hub, with a copy of the task's data set: without a network, or to pin a
    revision. For a group or tag, it applies to all its tasks."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.data and self.dataset is not None:
            raise wrong_at("dataset", "cannot be combined with data; name single files or a complete data set")
        if self.data and self.split is not None:
            raise wrong_at("split", "cannot be combined with data, whose files are the splits; leave it out")
        return self

    @field_validator("data")
    @classmethod
    def _readable(cls, data: dict[str, str]) -> dict[str, str]:
        for split, reference in data.items():
            if not re.fullmatch(r"\w{1,50}", split):
                raise ValueError(f"{split!r} is not a valid split name; use up to 50 letters, digits and _")
            if PurePosixPath(reference.partition("@sha256:")[0]).suffix.lower() not in DATA_SUFFIXES:
                raise wrong_at(split, f"{reference!r} should be a file ending in {', '.join(DATA_SUFFIXES)}")
        return data


class Options(ModelOptions):
    """How the models are evaluated. The defaults are those of lm-eval's command."""

    engine: Literal["shared", "lm_eval"] = "shared"
    """`shared` reads what requests have in common once. `lm_eval` leaves the batches to lm-eval, to compare."""
    backend: Literal["hf", "vllm"] = "hf"
    """Inference library: transformers, or vLLM on GPUs (`pip install -e '.[vllm]'`). If the stage's `resources` name
    several GPUs and there is one process, the model is split over them."""
    apply_chat_template: bool = False
    """Format each question with the tokenizer's chat template; set it for a model that was trained with one."""
    fewshot_as_multiturn: bool | None = None
    """Few-shot examples as turns of a conversation. None: if the chat template is applied."""
    system_instruction: str | None = None
    """A system message before every question."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate only the first `limit` items of each task. For trials, not for scores that you report."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens; longer ones are truncated on the left. None: the limit in the model's config."""
    gen_kwargs: GenerationOptions = Field(default_factory=GenerationOptions)
    """Override each task's own settings: until, max_gen_toks, and fields of transformers' GenerationConfig."""
    bootstrap_iters: int = Field(default=100_000, ge=0)
    """Resamples for the standard errors of metrics that are not a mean. 0: no standard errors at all."""
    log_samples: bool = True
    """Save every question and answer. The report needs them for paired standard errors."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute code the model wrote, such as humaneval. It can do on this machine whatever you can."""

    @model_validator(mode="after")
    def _multiturn_needs_a_template(self) -> Self:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn: true needs apply_chat_template: true, which defines the turns")
        return self

    @property
    def multiturn(self) -> bool:
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


class LMEvalStage(EvaluationStage):
    """Benchmarks through lm-evaluation-harness."""

    kind: ClassVar[str] = "lm_eval"
    version: ClassVar[int] = 4
    is_forked: ClassVar[bool] = True

    tasks: Annotated[list[Task], Field(min_length=1), unique_by("task")]
    """Benchmarks: tasks, groups or tags of lm-eval, or of the folder `include_path`."""
    include_path: str | None = None
    """A folder with your own task files. Their Python functions and templates run: include only what you trust."""
    options: Options = Options()
    launch: Launch | None = None
    """Options of `accelerate launch`: several processes evaluate a part of the items each, with a copy of the model
    each. Absent: one process. A task's random few-shot examples are drawn by each process for its own items."""
    seed: int | None = None
    """For random few-shot examples and for sampling. None: lm-eval's own seeds."""

    @model_validator(mode="after")
    def _processes_fit(self) -> Self:
        if self.launch is not None and self.launch.sharding:
            raise wrong_at(f"launch.{self.launch.sharding}", "is for training; raise resources.gpus instead")
        if self.launch is not None and self.options.backend == "vllm":
            raise wrong_at("launch", "works with the backend hf only; vllm uses as many GPUs as resources.gpus says")
        return self

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        return ("lm_eval",)

    @property
    def processes(self) -> int:
        return 1 if self.launch is None else self.launch.processes_per_machine

    def needs(self) -> dict[str, Need]:
        needs = super().needs()
        if self.include_path is not None:
            needs["include_path"] = Need("data", self.include_path, "include_path")
        for i, task in enumerate(self.tasks):
            if task.dataset is not None:
                needs[f"dataset.{task.task}"] = Need("data", task.dataset, f"tasks.{i}.dataset")
            for split, reference in task.data.items():
                needs[f"data.{task.task}.{split}"] = Need("data", reference, f"tasks.{i}.data.{split}")
        return needs

    def measured_items(self) -> list[Items]:
        items = []
        for i, task in enumerate(self.tasks):
            items += [Items(f"tasks.{i}.data.{split}", f"data.{task.task}.{split}") for split in task.data]
            if not task.data:
                source = None if task.dataset is None else f"dataset.{task.task}"
                items.append(Items(f"tasks.{i}.task", source, f"{task.task} {task.split or ''}"))
        return items

    def named_files(self, files: dict[str, Path]) -> dict[str, Path]:
        return outside_files(files["include_path"]) if "include_path" in files else {}

    def check(self, files: dict[str, Path]) -> None:
        for name, path in files.items():
            if name.startswith("data."):
                _require_rows(path)
        for i, task in enumerate(self.tasks):
            if task.dataset is not None and not files[f"dataset.{task.task}"].is_dir():
                raise UserError(f"{task.dataset} is a file; name files under data", f"tasks.{i}.dataset")
        check_model(files["model"], self.trust_remote_code, "models")
        check_context(files["model"], self.options.max_length, "options.max_length")
        require_vllm(self.options.backend)

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        sources = super().foreign_code(files)
        if self.options.confirm_run_unsafe_code:
            sources.append("options.confirm_run_unsafe_code: code that the model writes runs")
        include = files.get("include_path")
        if include and has_python(include):
            sources.append(
                f"include_path: Python of the tasks in {self.include_path} runs; it can read files that are not tracked"
            )
        return sources


@cache
def _require_rows(path: Path) -> None:
    for _ in read_rows(path):
        pass
