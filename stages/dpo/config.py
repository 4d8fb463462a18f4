"""What a `dpo` stage's section of a recipe may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.base import wrong_at
from stages.data.formats import PAIR_COLUMNS, Pair, columns_of
from stages.data.reader import read_pairs
from stages.library_options.option_models import Options, options
from stages.training.config import TrainingData, TrainingStage

if TYPE_CHECKING:
    from typing import Self

    DPOOptions = Options
else:
    DPOOptions = options("DPOConfig")


class DPOData(TrainingData):
    """The preference pairs of a dpo stage."""

    format: Literal["auto", "prompt_completion", "alpaca", "official"] = "auto"
    """What the columns of instruction data mean, where `rejected` makes pairs of it. `official` puts any pairs into
    plain text by the rule of the paper's scripts."""
    rejected: Literal["column", "other_row"] = "column"
    """`column`: rows carry prompt, chosen and rejected. `other_row`: rows are instruction data; chosen is the row's
    own completion, rejected another row's with another text, drawn by the seed."""

    def known_columns(self) -> set[str]:
        """What `columns` may rename."""
        if self.rejected == "column":
            return set(PAIR_COLUMNS)
        return columns_of(["prompt_completion", "alpaca", "official"] if self.format == "auto" else [self.format])


class DPOStage(TrainingStage):
    """Direct preference optimisation; the reference is the model it starts from."""

    kind: ClassVar[str] = "dpo"
    version: ClassVar[int] = 2
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        "eval_loss": "lowest",
        "eval_rewards/accuracies": "highest",
        "eval_rewards/margins": "highest",
    }

    data: DPOData
    train: DPOOptions = Field(default_factory=DPOOptions)
    """Fields of TRL's DPOConfig; the few that would work against the pipeline are refused, with the reason."""

    @model_validator(mode="after")
    def _losses_fit(self) -> Self:
        options = self.train.model_dump()
        losses, weights = options.get("loss_type") or ["sigmoid"], options.get("loss_weights")
        if weights is not None and len(weights) != len(losses):
            raise wrong_at("train.loss_weights", f"has {len(weights)} weights for {len(losses)} losses of loss_type")
        if "exo_pair" in losses and not options.get("label_smoothing"):
            raise wrong_at("train.loss_type", "exo_pair needs label_smoothing above 0; its paper recommends 1e-3")
        if self.lora is not None and options.get("sync_ref_model"):
            raise wrong_at("train.sync_ref_model", "does not work with lora, whose reference is the bare model")
        return self

    def rows(self, path: Path, part: str, dropped: list[str] | None = None) -> Iterator[tuple[int, Pair]]:
        """(number in the file, pair) for the data at `path`, named as `part`; TrainingStage.rows says more."""
        data = self.data
        return read_pairs(path, data.reading(part, data.format), data.rejected, self.seed, dropped)
