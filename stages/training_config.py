"""What the sections of all stages that train a model have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import BASE, Config, Need, StageConfig
from stages.options import Options, options

if TYPE_CHECKING:
    LoraOptions = Options
else:
    LoraOptions = options("LoraConfig")


class TrainingData(Config):
    """The rows of a training stage: JSONL, JSON, Parquet or CSV files."""

    train: str
    """A file: a path relative to the recipe, org/name@revision#file on the hub, or pypi:..."""
    eval: str | None = None
    """Likewise; the loss on it is reported, nothing is chosen by it."""


class TrainingStage(StageConfig):
    """A stage that starts from a model and publishes a trained one."""

    makes: ClassVar[Literal["model"]] = "model"

    model: str = BASE
    """What to start from: a stage's name, `base`, or a reference to a model."""
    data: TrainingData
    lora: LoraOptions | None = None
    """Fields of PEFT's LoraConfig; the adapter is merged into the published model. Absent: all weights train."""
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Of initial weights, LoRA's initial weights, dropout, drawn pairs and the order of the rows."""

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Self:
        asked = getattr(getattr(self, "train", None), "eval_strategy", None)
        if asked not in (None, "no") and self.data.eval is None:
            raise ValueError(f"train.eval_strategy is {asked!r}, but there is no evaluation data; name it as data.eval")
        return self

    def needs(self) -> dict[str, Need]:
        """The model to start from and the data files."""
        needs = {"model": Need("model", self.model, "model"), "train": Need("data", self.data.train, "data.train")}
        if self.data.eval is not None:
            needs["eval"] = Need("data", self.data.eval, "data.eval")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Read every row, so that a bad one is known before anything runs. Raises BadInput."""
        self.rows(files)

    def rows(self, files: dict[str, Path]) -> dict[str, list[Any]]:
        """The rows of the files `train` and, if given, `eval`."""
        raise NotImplementedError
