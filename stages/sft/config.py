"""What an `sft` stage's section of a recipe may say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import Config
from stages.options import Options, options
from stages.rows import Example, read_examples
from stages.training_config import TrainingData, TrainingStage

if TYPE_CHECKING:
    from typing import Self

    SFTOptions = Options
else:
    SFTOptions = options("SFTConfig")


class SFTData(TrainingData):
    """The data of an sft stage."""

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


class SFTStage(TrainingStage):
    """Weighted instruction tuning of a model."""

    kind: ClassVar[str] = "sft"
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.sft.stage:run"

    data: SFTData
    weights: Weights
    train: SFTOptions = Field(default_factory=SFTOptions)
    """Fields of TRL's SFTConfig; stages.options says which are refused, and why."""
    random_init: bool = False
    """Pre-train: start from random weights, drawn from the model's config and the seed."""

    def rows(self, files: dict[str, Path]) -> dict[str, list[Example]]:
        """The rows of the files `train` and, if given, `eval`. Raises BadInput."""
        return {name: read_examples(files[name], self.data.format) for name in ("train", "eval") if name in files}
