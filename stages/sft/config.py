"""What an `sft` stage's section of a recipe may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import Config
from stages.data.formats import FORMATS, Row, columns_of
from stages.data.reader import read_examples
from stages.data.segments import weights_by_segment
from stages.library_options.option_models import Options, options
from stages.training.config import TrainingData, TrainingStage

if TYPE_CHECKING:
    from typing import Self

    SFTOptions = Options
else:
    SFTOptions = options("SFTConfig")


class SFTData(TrainingData):
    """The data of an sft stage."""

    format: Literal["auto", "prompt_completion", "messages", "text", "alpaca", "sharegpt", "tokens", "official"] = (
        "auto"
    )
    """What the columns mean; `auto` looks at the first row. `official` is the text rule of the paper's scripts."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of `messages` are completion; those before the last are prompt under `last`."""

    def known_columns(self) -> set[str]:
        """What `columns` may rename."""
        return columns_of(FORMATS if self.format == "auto" else [self.format])


class Weights(Config):
    """The weights of the WIT loss (paper, section 3), by what a token is."""

    prompt: float = Field(ge=0)
    """lambda_p, on the tokens of the prompt."""
    completion: float = Field(ge=0)
    """lambda_r, on the tokens of the completion (the paper's response)."""
    system: float | None = Field(default=None, ge=0)
    """On the words of system messages; absent: as `prompt`."""
    template: float | None = Field(default=None, ge=0)
    """On what the chat template writes around the messages; absent: as `prompt`."""

    @property
    def table(self) -> list[float]:
        """The weight of each Segment, by its value."""
        return weights_by_segment(self.prompt, self.completion, self.system, self.template)

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if not any((self.prompt, self.completion, self.system, self.template)):
            raise ValueError("prompt and completion are both 0, so there is nothing to learn; raise one of them")
        return self


class SFTStage(TrainingStage):
    """Weighted instruction tuning of a model."""

    kind: ClassVar[str] = "sft"
    version: ClassVar[int] = 3
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        "eval_completion_loss": "lowest",
        "eval_prompt_loss": "lowest",
    }
    """Without weights: the WIT loss itself, eval_loss, cannot be compared between cells of other weights."""
    cost_invariant: ClassVar[tuple[str, ...]] = (*TrainingStage.cost_invariant, "weights")

    data: SFTData
    weights: Weights
    train: SFTOptions = Field(default_factory=SFTOptions)
    """Fields of TRL's SFTConfig; the few that would work against the pipeline are refused, with the reason."""
    random_init: bool = False
    """Pre-train: start from random weights, drawn from the model's config and the seed."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.random_init and self.lora is not None:
            raise ValueError("random_init draws all weights anew, so all of them have to train; leave lora out")
        options = self.train.model_dump()
        if options.get("packing") and options.get("max_length", "default") is None:
            raise ValueError("train.packing fills rows up to train.max_length; set max_length to a number")
        return self

    @property
    def reads_weights(self) -> bool:
        """Whether it starts from the model's weights, not from its config alone."""
        return not self.random_init

    def rows(self, path: Path, part: str, dropped: list[str] | None = None) -> Iterator[tuple[int, Row]]:
        """(number in the file, row) for the data at `path`, named as `part`; TrainingStage.rows says more."""
        return read_examples(path, self.data.reading(part, self.data.format), dropped)
