"""The section of an `sft` stage in a recipe."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config
from stages.data.formats import Row
from stages.data.reader import RowReport, read_examples
from stages.data.segments import weights_by_segment
from stages.library_options.option_models import SFTOptions
from stages.training.config import SFTData, TrainingStage


class Weights(Config):
    """The weights of the WIT loss (paper, section 3) by kind of token."""

    prompt: float = Field(ge=0)
    """lambda_p, on prompt tokens."""
    completion: float = Field(ge=0)
    """lambda_r, on completion tokens (the paper's response)."""
    system: float | None = Field(default=None, ge=0)
    """On the words of system messages; default: `prompt`."""
    template: float | None = Field(default=None, ge=0)
    """On the chat template's own tokens around the messages; default: `prompt`."""

    @property
    def segment_weights(self) -> list[float]:
        return weights_by_segment(self.prompt, self.completion, self.system, self.template)

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if not any((self.prompt, self.completion, self.system, self.template)):
            raise ValueError("prompt and completion are both 0, so no token has a weight; raise one of them")
        return self


class SFTStage(TrainingStage):
    """Weighted instruction tuning of a model."""

    kind: ClassVar[str] = "sft"
    version: ClassVar[int] = 4
    is_forked: ClassVar[bool] = True
    trl_config: ClassVar[str] = "SFTConfig"
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        "eval_completion_loss": "lowest",
        "eval_prompt_loss": "lowest",
    }
    """The unweighted losses: eval_loss, the WIT loss, is not comparable between cells with different weights."""
    eval_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        **search_metrics,
        "eval_loss": "lowest",
        "eval_mean_token_accuracy": "highest",
    }
    cost_invariant: ClassVar[tuple[str, ...]] = (*TrainingStage.cost_invariant, "weights")

    data: SFTData
    weights: Weights
    train: SFTOptions = Field(default_factory=SFTOptions)
    """Fields of TRL's SFTConfig; the few that conflict with the pipeline are refused with the reason."""
    random_init: bool = False
    """Pre-train: start from random weights, initialised by the model's config and the seed."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.random_init and self.lora is not None:
            raise ValueError("random_init draws all weights, so all of them have to train; leave lora out")
        options = self.train.model_dump()
        packing = next((name for name in ("packing", "eval_packing") if options.get(name)), None)
        if packing and options.get("max_length", "default") is None:
            raise ValueError(f"train.{packing} fills rows up to train.max_length; set max_length to a number")
        return self

    @property
    def reads_weights(self) -> bool:
        return not self.random_init

    def rows(self, path: Path, part: str, report: RowReport | None = None) -> Iterator[tuple[int, Row]]:
        return read_examples(path, self.data.reading(part, self.data.format), report)
