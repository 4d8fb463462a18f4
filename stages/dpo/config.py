"""What a `dpo` stage's section of a recipe may say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.base import BASE, Config, Need, StageConfig
from stages.options import Options, options

if TYPE_CHECKING:
    DPOOptions = Options
    LoraOptions = Options
else:
    DPOOptions = options("DPOConfig")
    LoraOptions = options("LoraConfig")


class DPOData(Config):
    """The preference pairs of a dpo stage: JSONL, JSON, Parquet or CSV files."""

    train: str
    """A file: a path relative to the recipe, org/name@revision#file on the hub, or pypi:..."""
    eval: str | None = None
    """Likewise; the loss on it is reported, nothing is chosen by it."""
    format: Literal["auto", "prompt_completion", "alpaca", "official"] = "auto"
    """What the columns of instruction data mean, where `rejected` makes pairs of it."""
    rejected: Literal["column", "other_row"] = "column"
    """`column`: rows carry prompt, chosen and rejected. `other_row`: rows are instruction data; chosen is the row's
    own completion, rejected another row's with another text, drawn by the seed."""


class DPOStage(StageConfig):
    """Direct preference optimisation; the reference is the model it starts from."""

    kind: ClassVar[str] = "dpo"
    makes: ClassVar[Literal["model"]] = "model"
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.dpo.stage:run"

    model: str = BASE
    """What to start from, and the frozen reference: a stage's name, `base`, or a reference to a model."""
    data: DPOData
    train: DPOOptions = Field(default_factory=DPOOptions)
    """Any field of TRL's DPOConfig."""
    lora: LoraOptions | None = None
    """Any field of PEFT's LoraConfig; the adapter is merged into the published model. Absent: all weights train."""
    seed: int = 23
    """Of LoRA's initial weights, dropout, the order of the rows and drawn pairs."""

    def needs(self) -> dict[str, Need]:
        """The model to start from and the data files."""
        needs = {
            "model": Need("model", self.model, "model"),
            "train": Need("data", self.data.train, "data.train"),
        }
        if self.data.eval is not None:
            needs["eval"] = Need("data", self.data.eval, "data.eval")
        return needs

    def check(self, files: dict[str, Any]) -> None:
        """Read every row, so that a bad one is known before anything runs. Raises BadInput."""
        from stages.rows import read_pairs

        for name in ("train", "eval"):
            if name in files:
                read_pairs(files[name], self.data.format, self.data.rejected, self.seed)
