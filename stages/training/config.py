"""What the sections of all stages that train a model have in common."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import BASE, Config, Need, StageConfig, UserError, wrong_at
from stages.data.formats import FORMATS, columns_of
from stages.data.reader import Reading
from stages.library_options.option_models import Options, options
from stages.models.lora_targets import check_targets
from stages.models.model_folder import REMOTE_CODE, check_model
from stages.training.launch import Launch

if TYPE_CHECKING:
    LoraOptions = Options
    QuantizationOptions = Options
else:
    LoraOptions = options("LoraConfig")
    QuantizationOptions = options("BitsAndBytesConfig")


TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""What `train.report_to` may name: transformers' integrations, each with the package of its name."""
_OF_TRACKIO = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_WHERE_REPORTED = ("report_to", "run_name", "project", *_OF_TRACKIO)


class Quantization(QuantizationOptions):
    """Fields of transformers' BitsAndBytesConfig: how the frozen weights under an adapter are kept."""

    llm_int8_skip_modules: list[str] | None = None
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    bnb_4bit_quant_storage: Literal["float64", "float32", "float16", "bfloat16", "int8", "uint8"] | None = None

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        asked = [name for name in ("load_in_4bit", "load_in_8bit") if self.model_dump().get(name)]
        if len(asked) != 1:
            raise ValueError("set one of load_in_4bit: true and load_in_8bit: true")
        return self


class TrainingData(Config):
    """The rows of a training stage: JSONL, JSON, Parquet or CSV files, or a data set made of such files."""

    train: str
    """A file: a path relative to the recipe, org/name@revision#file on the hub, or pypi:... Or a whole data set: a
    folder, or org/name@revision."""
    eval: str | None = None
    """Likewise; the loss on it is reported; nothing but a `search` chooses by it."""
    train_split: str = "train"
    """The split of `train` where that is a data set."""
    eval_split: str = "test"
    """The split of `eval` likewise."""
    subset: str | None = None
    """The subset of both, where they are data sets of several."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The name of a column that the format knows -> the data's own name for it: `{prompt: question}`."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What a row that cannot be used is: an error, or left out, counted and listed."""

    def reading(self, part: str, format: str) -> Reading:
        """How the data named by `part`, `train` or `eval`, is read."""
        split = self.train_split if part == "train" else self.eval_split
        return Reading(format, self.columns, self.on_bad_row, split, self.subset)

    def check_splits(self, parts: dict[str, Path]) -> None:
        """Look for names of splits and subsets where the data are single files. Raises UserError."""
        keys = {f"{part}_split": part for part, path in parts.items() if not path.is_dir()}
        if len(keys) == len(parts):
            keys["subset"] = "train"
        for key, part in keys.items():
            if getattr(self, key) != TrainingData.model_fields[key].default:
                raise UserError(f"{parts[part]} is one file, which has no {key}; remove it", f"data.{key}")

    def known_columns(self) -> set[str]:
        """What `columns` may rename."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _split_has_data(self) -> Self:
        if self.eval is None and self.eval_split != type(self).model_fields["eval_split"].default:
            raise wrong_at("eval_split", "has no effect without eval; name the evaluation data, be it that of train")
        return self

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        known = sorted(self.known_columns())
        for name in self.columns:
            if name not in known:
                raise wrong_at(
                    f"columns.{name}", f"{name!r} is no column that this format reads; those are {', '.join(known)}"
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
        """Return the columns that `columns` may rename."""
        return columns_of(FORMATS if self.format == "auto" else [self.format])


_READ: set[tuple[str, str, str, Path]] = set()
"""Kind, data section, part and file of the rows that this process has found to be right: a grid's cells share them."""


DEFAULT_EPOCHS = 3.0
"""transformers' own num_train_epochs."""


class TrainingStage(StageConfig):
    """A stage that starts from a model and publishes a trained one."""

    output_kind: ClassVar[Literal["model"]] = "model"
    fingerprint_exclude: ClassVar[tuple[str, ...]] = tuple(f"train.{name}" for name in ("save_steps", *_WHERE_REPORTED))
    cost_invariant: ClassVar[tuple[str, ...]] = ("seed", "train.learning_rate", "train.beta")

    model: str = BASE
    """What to start from: a stage's name, `base`, or a reference to a model."""
    data: TrainingData
    lora: LoraOptions | None = None
    """Fields of PEFT's LoraConfig; the adapter is merged into the published model. Absent: all weights train."""
    quantization: Quantization | None = None
    """Fields of transformers' BitsAndBytesConfig, for QLoRA; what is published is never quantised."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model, for one that transformers does not know: they can do on this
    machine whatever you can do."""
    launch: Launch | None = None
    """Options of `accelerate launch`, to train in several processes. Absent: one."""
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Of initial weights, LoRA's initial weights, dropout, drawn pairs and the order of the rows."""

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Self:
        asked = getattr(getattr(self, "train", None), "eval_strategy", None)
        if asked not in (None, "no") and self.data.eval is None:
            raise wrong_at(
                "train.eval_strategy", f"is {asked!r}, but there is no evaluation data; name it as data.eval"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_are_frozen(self) -> Self:
        if self.quantization is not None and self.lora is None:
            raise wrong_at(
                "quantization",
                "quantised weights cannot be trained; add 'lora' to train an adapter on them, or leave this out",
            )
        return self

    @model_validator(mode="after")
    def _kernels_are_code(self) -> Self:
        given = self.model_init
        if not self.trust_remote_code and ("/" in str(given.get("attn_implementation")) or given.get("use_kernels")):
            raise ValueError(
                "train.model_init_kwargs asks for kernels from the hub, which are code of others; add"
                " trust_remote_code: true to the stage if you trust them"
            )
        return self

    @model_validator(mode="after")
    def _trackers_are_known(self) -> Self:
        for name in self.trackers:
            if name not in TRACKERS:
                known = ", ".join(("none", *TRACKERS))
                raise wrong_at("train.report_to", f"{name!r} is no tracker that a recipe may name; those are {known}")
        return self

    @property
    def trackers(self) -> list[str]:
        """What the training is reported to."""
        asked = getattr(getattr(self, "train", None), "report_to", None) or []
        return [name for name in ([asked] if isinstance(asked, str) else asked) if name != "none"]

    @property
    def reads_weights(self) -> bool:
        """Whether it starts from the model's weights, not from its config alone."""
        return True

    @property
    def published_dtype(self) -> str:
        """Of the weights that it trains and publishes."""
        return str(self.model_init.get("dtype", "float32"))

    @property
    def model_init(self) -> dict[str, Any]:
        """What `train.model_init_kwargs` sets."""
        given: Options | None = getattr(getattr(self, "train", None), "model_init_kwargs", None)
        return given.model_dump() if given else {}

    @property
    def processes(self) -> int:
        """How many processes a step of this stage runs in on this machine."""
        return 1 if self.launch is None else self.launch.here

    def shortened(self, share: Fraction) -> Self:
        """This stage with that share of its steps or epochs, and of its warm-up: the whole schedule, compressed."""
        train: Options = self.train  # type: ignore[attr-defined]
        given = train.model_dump()
        if given.get("max_steps", -1) > 0:
            changed: dict[str, Any] = {"max_steps": max(1, round(given["max_steps"] * share))}
        else:
            changed = {"num_train_epochs": float((given.get("num_train_epochs") or DEFAULT_EPOCHS) * share)}
        if (warmup := given.get("warmup_steps") or 0) >= 1:  # below 1 it is a share itself
            changed["warmup_steps"] = float(max(1, round(warmup * share)))
        return self.model_copy(update={"train": train.model_copy(update=changed)})

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's, where it is trusted."""
        return [REMOTE_CODE] if self.trust_remote_code else []

    def needs(self) -> dict[str, Need]:
        """The model to start from and the data files."""
        needs = {
            "model": Need("model", self.model, "model", self.trust_remote_code),
            "train": Need("data", self.data.train, "data.train"),
        }
        if self.data.eval is not None:
            needs["eval"] = Need("data", self.data.eval, "data.eval")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Read every row, so that a bad one is known before anything runs, and look at the model. Raises UserError."""
        check_model(files["model"], self.trust_remote_code, "model", self.reads_weights)
        self._check_packages()
        parts: dict[str, Path] = {part: files[part] for part in ("train", "eval") if part in files}
        self.data.check_splits(parts)
        if self.lora is not None:
            check_targets(files["model"], self.lora.model_dump())
        for part, path in parts.items():
            read = (self.kind, self.data.model_dump_json(), part, path)
            if read not in _READ:
                for _ in self.rows(path, part):
                    pass
                _READ.add(read)

    def _check_packages(self) -> None:
        """Look whether what the options need is installed. Raises UserError."""
        asked = {name: (name, "train.report_to") for name in self.trackers}
        if getattr(getattr(self, "train", None), "use_liger_kernel", None):
            asked["liger_kernel"] = "liger-kernel", "train.use_liger_kernel"
        for module, (package, key) in asked.items():
            if (found := find_spec(module)) is None or found.origin is None:  # a mere folder, as wandb leaves one
                raise UserError(f"needs the package {package}, which is not installed; pip install {package}", key)

    def rows(self, path: Path, part: str, dropped: list[str] | None = None) -> Iterator[tuple[int, Any]]:
        """(number in the file, row) for the data at `path`, which the recipe names as `part`, `train` or `eval`.

        `dropped` receives the place and reason of every row left out by `on_bad_row: drop`. Raises UserError.
        """
        raise NotImplementedError
