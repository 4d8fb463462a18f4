"""The section of an `sft` stage in a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Context
from stages.data.formats import Row
from stages.data.reader import read_examples
from stages.data.segments import weights_by_segment
from stages.library_options.option_models import Options, options
from stages.training.config import PreparedRows, SFTData, TrainingStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    SFTOptions = Options
else:
    SFTOptions = options("SFTConfig")


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
    trl_config: ClassVar[str] = "SFTConfig"
    version: ClassVar[int] = 3
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        "eval_completion_loss": "lowest",
        "eval_prompt_loss": "lowest",
    }
    """The unweighted losses: eval_loss, the WIT loss, is not comparable between cells with different weights."""
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

    def rows(self, path: Path, part: str, dropped: list[str] | None = None) -> Iterator[tuple[int, Row]]:
        return read_examples(path, self.data.reading(part, self.data.format), dropped)

    @property
    def row_settings(self) -> tuple[Any, ...]:
        return (*super().row_settings, *(weight != 0 for weight in self.weights.segment_weights))

    def prepare_rows(self, context: Context, split: str, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
        from stages.sft.dataset_cache import load_prepared
        from stages.sft.row_filter import check_rows, select

        max_length = self.train_options["max_length"]
        prepared, _ = load_prepared(context, split, tokenizer, max_length)
        stats = select(prepared, self.weights.segment_weights)[1]
        check_rows(split, stats, max_length, self.weights.completion)
        return PreparedRows(stats.rows_used, stats.longest, stats.largest_id)

    @property
    def packs(self) -> bool:
        options = self.train.model_dump()
        return any(options.get(name) for name in ("packing", "eval_packing", "padding_free"))

    def check_packing(self, model: Path) -> None:
        from stages.sft.packing import check_architecture  # imports TRL, which takes seconds

        check_architecture(model, self.trust_remote_code)

    def weight_slips(self) -> Iterator[tuple[str, str]]:
        if self.weights.prompt and not self.weights.completion:
            yield "weights", "completion is 0, so the model learns to write prompts and not answers"
        for name, weight in self.weights:
            if weight is not None and weight > 1:
                yield f"weights.{name}", f"{weight:g} is above 1, the paper's largest weight; the loss grows with it"
