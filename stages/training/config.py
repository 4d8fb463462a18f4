"""The recipe section that all stages which train a model share."""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from stages.base import AT_KEY, BASE, Config, Items, Need, StageConfig, UserError, wrong_at
from stages.data.formats import FORMATS, columns_of
from stages.data.reader import Reading, RowReport
from stages.library_options.option_models import RULES, LoraOptions, Options, QuantizationOptions, option_help
from stages.models.model_folder import REMOTE_CODE, check_model
from stages.system.did_you_mean import did_you_mean, list_choices
from stages.training.launch import Launch

TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""Supported values of `train.report_to`; each needs the package of the same name."""

DEFAULT_EPOCHS = 3.0  # transformers' default of num_train_epochs

_CHECKED_ROWS: set[tuple[str, str, str, Path]] = set()
"""Kind, data section, split and file of rows that this process has checked: the cells of a matrix share them."""


class Quantization(QuantizationOptions):
    """Fields of transformers' BitsAndBytesConfig: how the frozen weights under an adapter are quantised."""

    llm_int8_skip_modules: list[str] | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    bnb_4bit_quant_storage: Literal["float64", "float32", "float16", "bfloat16", "int8", "uint8"] | None = None

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if bool(self.model_dump().get("load_in_4bit")) == bool(self.model_dump().get("load_in_8bit")):
            raise ValueError("set one of load_in_4bit: true and load_in_8bit: true")
        return self


class TrainingData(Config):
    """The rows of a training stage: JSONL, JSON, CSV, Parquet or Arrow files, or a data set of such files."""

    train: str
    """A file: a path relative to the recipe, org/name@revision#file on the hub, or pypi:... Or a data set: a folder, or
    org/name@revision."""
    eval: str | None = None
    """Evaluation data, named in the same way. Its loss is reported; only `search` and `select` choose by it."""
    train_split: str = "train"
    """The split of `train`, if that is a data set."""
    eval_split: str = "test"
    """The split of `eval`, if that is a data set."""
    subset: str | None = None
    """The subset of both, if they are data sets with several."""
    columns: dict[str, str] = Field(default_factory=dict)
    """A column name of the format -> the name in the data: `{prompt: question}`."""
    on_bad_row: Literal["error", "drop"] = "error"
    """`error`: an unusable row stops the run. `drop`: it is left out, counted and listed."""

    def reading(self, split: str, format: str) -> Reading:
        """Return how to read `split`: `train` or `eval`."""
        name = self.train_split if split == "train" else self.eval_split
        return Reading(format, self.columns, self.on_bad_row, name, self.subset)

    def check_splits(self, paths: dict[str, Path]) -> None:
        """Raise UserError if a split or subset is set for data that are single files; `paths` is by split."""
        keys = {f"{split}_split": path for split, path in paths.items() if not path.is_dir()}
        if len(keys) == len(paths):
            keys["subset"] = paths["train"]
        for key, path in keys.items():
            if getattr(self, key) != TrainingData.model_fields[key].default:
                raise UserError(f"{path} is one file, which has no {key}; remove it", f"data.{key}")

    def known_columns(self) -> set[str]:
        """Return the keys that `columns` may have."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _splits_and_columns_exist(self) -> Self:
        if self.eval is None and self.eval_split != type(self).model_fields["eval_split"].default:
            raise wrong_at(
                "eval_split", "has no effect without eval; set eval too, to the same data as train if you like"
            )
        known = sorted(self.known_columns())
        for name in self.columns:
            if name not in known:
                raise wrong_at(
                    f"columns.{name}", f"{name!r} is not a column of this format, which has {', '.join(known)}"
                )
        return self


class SFTData(TrainingData):
    """Instruction rows, of an sft stage and of others that read such rows."""

    format: Literal["auto", "prompt_completion", "messages", "text", "alpaca", "sharegpt", "tokens", "official"] = (
        "auto"
    )
    """What the columns mean. `auto` decides by the first row. `official` is the text format of the paper's scripts."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of `messages` are completion. With `last`, the earlier ones are prompt."""

    def known_columns(self) -> set[str]:
        return columns_of(FORMATS if self.format == "auto" else [self.format])


def select_key(key: str) -> str:
    """Return the key under which a training has `key` of the evaluation in its `select`."""
    if key.startswith("models"):
        return "model"
    return "select." + (re.sub(r"^(tasks\.0|options)\.", "", key) if key != "tasks" else "task")


class Selection(Config):
    """Publish the best of several points of a training instead of the model after its last step."""

    metric: str
    """A metric on `data.eval`: eval_loss; for sft also eval_completion_loss, eval_prompt_loss and
    eval_mean_token_accuracy, for dpo eval_rewards/accuracies and eval_rewards/margins. With `task`, a metric of that:
    acc, or with its filter exact_match,strict-match."""
    every: int = Field(ge=1)
    """Optimiser steps between two points. The model after the last step is a point as well."""
    task: str | None = Field(default=None, min_length=1)
    """A task, group or tag of lm-eval, or of the folder `include_path`, by which points are compared instead of by
    `data.eval`. No lm_eval stage of the recipe can report the same items."""
    split: str | None = None
    """The split of the task's data set whose items are scored, such as validation. None: the task's own."""
    data: dict[str, str] = Field(default_factory=dict)
    """Split name -> file that replaces the task's data set, for your own development items."""
    num_fewshot: int | None = None
    """Few-shot examples in each prompt. None: the task's own number."""
    limit: int | None = None
    """Score only the first `limit` items."""
    apply_chat_template: bool = False
    """Format each question with the tokenizer's chat template."""
    include_path: str | None = None
    """A folder with your own task files. Their Python functions and templates run: include only what you trust."""

    def check_steps(self, steps: int) -> None:
        """Raise UserError if a training of `steps` optimiser steps has only one point."""
        if self.every >= steps:
            raise UserError(
                f"is {self.every}, but the training has {steps} steps, so its last step is the only point; set at most"
                f" {max(1, steps - 1)}, or leave select out",
                "select.every",
            )


class TrainingStage(StageConfig):
    """A stage that starts from a model and publishes a trained one."""

    trl_config: ClassVar[str]
    """The class in TRL whose fields `train` has."""
    eval_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]]
    """Metrics on `data.eval` by which `select` can choose a point -> which value is best."""
    has_reference: ClassVar[bool] = False
    """Whether a reference model reads the rows, too."""

    output_kind: ClassVar[Literal["model"]] = "model"
    fingerprint_exclude: ClassVar[tuple[str, ...]] = (
        "train.save_steps",
        "train.report_to",
        "train.run_name",
        "train.project",
        "train.trackio_space_id",
        "train.trackio_bucket_id",
        "train.trackio_static_space_id",
    )
    cost_invariant: ClassVar[tuple[str, ...]] = ("seed", "train.learning_rate", "train.beta")

    model: str = BASE
    """The model to start from: a stage's name, `base`, or a reference to a model."""
    data: TrainingData
    lora: LoraOptions | None = None
    """Fields of PEFT's LoraConfig. The adapter is merged into the published model. Absent: all weights train."""
    quantization: Quantization | None = None
    """Fields of transformers' BitsAndBytesConfig, for QLoRA. The published model is never quantised."""
    trust_remote_code: bool = False
    """Run the Python files in the model's folder, which a model that transformers does not know needs. They can do on
    this machine whatever you can do."""
    launch: Launch | None = None
    """Options of `accelerate launch`, to train in several processes. Absent: one process."""
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Random seed of initial weights, LoRA's initial weights, dropout, drawn pairs and the order of the rows."""
    select: Selection | None = Field(default=None, exclude_if=lambda select: select is None)
    """Publish the best of several points. Absent: the model after the last step is published."""

    if TYPE_CHECKING:  # a real field would change the order of the keys in manifests and model cards
        train: Options

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        strategy = self.train.model_dump().get("eval_strategy")
        if strategy not in (None, "no") and self.data.eval is None:
            raise wrong_at(
                "train.eval_strategy", f"is {strategy!r}, but there is no evaluation data; name it as data.eval"
            )
        if self.quantization is not None and self.lora is None:
            raise wrong_at(
                "quantization",
                "quantised weights cannot be trained; add 'lora' to train an adapter on them, or leave this out",
            )
        start = None if self.lora is None else self.lora.model_dump().get("init_lora_weights")
        sharding = None if self.launch is None else self.launch.sharding
        if start not in (None, True, False, "gaussian") and (self.quantization or sharding):
            cause = "quantization" if self.quantization else f"launch.{sharding}"
            raise wrong_at(
                "lora.init_lora_weights", f"{start} needs whole, unquantised weights; use true, or leave {cause} out"
            )
        options = self.model_init
        if not self.trust_remote_code and (
            "/" in str(options.get("attn_implementation")) or options.get("use_kernels")
        ):
            raise ValueError(
                "train.model_init_kwargs asks for kernels from the hub, which are third-party code; add"
                " trust_remote_code: true to the stage if you trust them"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                known = ", ".join(("none", *TRACKERS))
                raise wrong_at("train.report_to", f"{name!r} is not a supported tracker; use {known}")
        return self

    @model_validator(mode="after")
    def _can_select(self) -> Self:
        if self.select is None:
            return self
        options = self.train.model_dump()
        for name in ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"):
            if options.get(name) not in (None, False, 0, "no"):
                text = f"cannot be combined with select, which evaluates every {self.select.every} steps (select.every)"
                raise wrong_at(f"train.{name}", f"{text}; leave it out")
        if self.select.task is not None:
            if self.processes > 1:
                raise wrong_at("select.task", "scores points in one process; leave launch out, or choose by data.eval")
            try:
                _ = self.evaluation
            except ValidationError as error:
                details = error.errors()[0]
                keys = *details["loc"], *([details["ctx"]["key"]] if details["type"] == AT_KEY else [])
                raise wrong_at(select_key(".".join(map(str, keys))), details["msg"]) from None
            return self
        if names := self.select.model_dump(exclude_defaults=True).keys() - {"metric", "every"}:
            raise wrong_at(f"select.{min(names)}", "has no effect without select.task; set that, or leave this out")
        if self.select.metric not in self.eval_metrics:
            hint = did_you_mean(self.select.metric, self.eval_metrics) + list_choices("name one of", self.eval_metrics)
            raise wrong_at("select.metric", f"{self.select.metric!r} is no metric of stages of kind {self.kind}{hint}")
        if self.data.eval is None:
            raise wrong_at("select.metric", "is measured on evaluation data, and there are none; add data.eval")
        return self

    @property
    def evaluation(self) -> StageConfig | None:
        """The lm_eval stage that scores the points of `select`; None if they are not compared by a task."""
        if self.select is None or self.select.task is None:
            return None
        task = self.select.model_dump(exclude={"every"})
        section = {
            "models": ["the trained model"],
            "include_path": task.pop("include_path"),
            "options": {name: task.pop(name) for name in ("limit", "apply_chat_template")} | {"bootstrap_iters": 0},
            "tasks": [task],
            "trust_remote_code": self.trust_remote_code,
        }
        kinds: dict[str, type[StageConfig]] = import_module("stages.kinds").KINDS  # which imports this module
        return kinds["lm_eval"].model_validate(section)

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        return self.evaluation.versioned_packages if self.evaluation else ()

    def measured_items(self) -> list[Items]:
        if self.evaluation is None:
            return [Items("data.eval", "eval")] if self.select else []
        return [each._replace(key=select_key(each.key)) for each in self.evaluation.measured_items()]

    def named_files(self, files: dict[str, Path]) -> dict[str, Path]:
        return self.evaluation.named_files(files) if self.evaluation else {}

    @property
    def trackers(self) -> list[str]:
        """Names of the experiment trackers, without `none`."""
        names = self.train.model_dump().get("report_to") or []
        return [name for name in ([names] if isinstance(names, str) else names) if name != "none"]

    @property
    def reads_weights(self) -> bool:
        """Whether training starts from the model's weights, and not only from its config."""
        return True

    @property
    def published_dtype(self) -> str:
        return str(self.model_init.get("dtype", "float32"))

    @property
    def model_init(self) -> dict[str, Any]:
        """The options set in `train.model_init_kwargs`."""
        return self.train.model_dump().get("model_init_kwargs") or {}

    @property
    def train_options(self) -> dict[str, Any]:
        """The options of `train` over the libraries' defaults; of two names for one option, both have the value."""
        defaults = option_help("SFTConfig") | option_help(self.trl_config)
        options = {name: option.default for name, option in defaults.items()} | self.train.model_dump()
        if options["activation_checkpointing"] is not None:  # the newer name, which wins
            options["gradient_checkpointing"] = options["activation_checkpointing"]
        return options

    @property
    def processes(self) -> int:
        return 1 if self.launch is None else self.launch.processes_per_machine

    def shortened(self, share: Fraction) -> Self:
        """Return this stage with a share of its steps or epochs and of its warm-up: its schedule, compressed."""
        options = self.train.model_dump()
        if options.get("max_steps", -1) > 0:
            changes: dict[str, Any] = {"max_steps": max(1, round(options["max_steps"] * share))}
        else:
            changes = {"num_train_epochs": float((options.get("num_train_epochs") or DEFAULT_EPOCHS) * share)}
        if (warmup := options.get("warmup_steps") or 0) >= 1:  # below 1 it is a share of all steps
            changes["warmup_steps"] = float(max(1, round(warmup * share)))
        select = self.select and self.select.model_copy(update={"every": max(1, round(self.select.every * share))})
        return self.model_copy(update={"train": self.train.model_copy(update=changes), "select": select})

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        sources = [REMOTE_CODE] if self.trust_remote_code else []
        if self.evaluation:
            sources += self.evaluation.foreign_code(files)
        return list(dict.fromkeys(sources))

    def needs(self) -> dict[str, Need]:
        needs = {
            "model": Need("model", self.model, "model", self.trust_remote_code),
            "train": Need("data", self.data.train, "data.train"),
        }
        if self.data.eval is not None:
            needs["eval"] = Need("data", self.data.eval, "data.eval")
        for name, need in self.evaluation.needs().items() if self.evaluation else ():
            if need.kind == "data":
                needs[name] = Need("data", need.value, select_key(need.key))
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Check the model, the installed packages and every row before anything runs. Raises UserError."""
        check_model(files["model"], self.trust_remote_code, "model", self.reads_weights)
        self._check_packages()
        paths: dict[str, Path] = {split: files[split] for split in ("train", "eval") if split in files}
        self.data.check_splits(paths)
        for split, path in paths.items():
            key = (self.kind, self.data.model_dump_json(), split, path)
            if key not in _CHECKED_ROWS:
                for _ in self.rows(path, split):
                    pass
                _CHECKED_ROWS.add(key)

    def _check_packages(self) -> None:
        """Raise UserError if an option needs a package that is not installed."""
        needed = {name: (name, "train.report_to") for name in self.trackers}
        if self.train.model_dump().get("use_liger_kernel"):
            needed["liger_kernel"] = "liger-kernel", "train.use_liger_kernel"
        if module := RULES["optimizer_packages"].get(str(self.train.model_dump().get("optim"))):
            needed[module] = module.replace("_", "-"), "train.optim"
        for module, (package, key) in needed.items():
            spec = find_spec(module)
            if spec is None or spec.origin is None:  # no origin: a folder without code, such as wandb's output
                raise UserError(f"needs the package {package}, which is not installed; pip install {package}", key)

    def rows(self, path: Path, split: str, report: RowReport | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (number in the file, row) of the `train` or `eval` data at `path`. Raises UserError for unusable rows,
        or drops and lists them in `report` if on_bad_row is `drop`."""
        raise NotImplementedError
