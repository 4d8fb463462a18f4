"""What an `sft` stage's section of a recipe may say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import BASE, Config, Need, StageConfig
from stages.options import Options, options

if TYPE_CHECKING:
    from typing import Self

    SFTOptions = Options
    LoraOptions = Options
else:
    SFTOptions = options("SFTConfig")
    LoraOptions = options("LoraConfig")


class SFTData(Config):
    """The data of an sft stage: JSONL, JSON, Parquet or CSV files."""

    train: str
    """A file: a path relative to the recipe, org/name@revision#file on the hub, or pypi:..."""
    eval: str | None = None
    """Likewise; the loss on it is reported, nothing is chosen by it."""
    format: Literal["auto", "prompt_completion", "text", "alpaca", "official"] = "auto"
    """What the columns mean; `auto` looks at the first row. `official` is the text rule of the paper's scripts."""


class Weights(Config):
    """lambda_p and lambda_r of the WIT loss (paper, section 3)."""

    prompt: float = Field(ge=0)
    """lambda_p, on the tokens of the prompt."""
    completion: float = Field(ge=0)
    """lambda_r, on the tokens of the completion (the paper's response)."""

    @model_validator(mode="after")
    def _not_both_zero(self) -> Self:
        if self.prompt == 0 and self.completion == 0:
            raise ValueError("prompt and completion are both 0, so there is nothing to learn; raise one of them")
        return self


class SFTStage(StageConfig):
    """Weighted instruction tuning of a model."""

    kind: ClassVar[str] = "sft"
    makes: ClassVar[Literal["model"]] = "model"
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.sft.stage:run"

    model: str = BASE
    """What to start from: a stage's name, `base`, or a reference to a model."""
    data: SFTData
    weights: Weights
    train: SFTOptions = Field(default_factory=SFTOptions)
    """Any field of TRL's SFTConfig."""
    lora: LoraOptions | None = None
    """Any field of PEFT's LoraConfig; the adapter is merged into the published model. Absent: all weights train."""
    random_init: bool = False
    """Pre-train: start from random weights, drawn from the model's config and the seed."""
    seed: int = 23
    """Of initial weights, LoRA's initial weights, dropout and the order of the rows."""

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
        from stages.rows import read_examples

        for name in ("train", "eval"):
            if name in files:
                read_examples(files[name], self.data.format)
