"""The recipe section of a `dpo` stage."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import wrong_at
from stages.data.formats import PAIR, Pair, columns_of
from stages.data.reader import RowReport, read_pairs
from stages.library_options.option_models import DPOOptions
from stages.training.config import TrainingData, TrainingStage


class DPOData(TrainingData):
    """The preference pairs of a dpo stage."""

    format: Literal["auto", "prompt_completion", "alpaca", "official"] = "auto"
    """Format of instruction data, from which `rejected: other_row` builds pairs. `official` writes pairs as plain text,
    by the rule of the paper's scripts."""
    rejected: Literal["column", "other_row"] = "column"
    """`column`: rows have prompt, chosen and rejected. `other_row`: rows are instruction data; chosen is the row's own
    completion, rejected a different one of another row, drawn with the seed."""

    def known_columns(self) -> set[str]:
        if self.rejected == "column":
            return set(PAIR.columns)
        return columns_of(["prompt_completion", "alpaca", "official"] if self.format == "auto" else [self.format])


class DPOStage(TrainingStage):
    """Direct preference optimisation. The reference is the model that training starts from."""

    kind: ClassVar[str] = "dpo"
    version: ClassVar[int] = 3
    is_forked: ClassVar[bool] = True
    trl_config: ClassVar[str] = "DPOConfig"
    has_reference: ClassVar[bool] = True
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {
        "eval_loss": "lowest",
        "eval_rewards/accuracies": "highest",
        "eval_rewards/margins": "highest",
    }
    eval_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = search_metrics

    data: DPOData
    train: DPOOptions = Field(default_factory=DPOOptions)
    """Fields of TRL's DPOConfig. The few that would conflict with the pipeline are refused, with the reason."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        options = self.train.model_dump()
        losses, weights = options.get("loss_type") or ["sigmoid"], options.get("loss_weights")
        if weights is not None and len(weights) != len(losses):
            raise wrong_at("train.loss_weights", f"has {len(weights)} weights for {len(losses)} losses of loss_type")
        if "exo_pair" in losses and not options.get("label_smoothing"):
            raise wrong_at("train.loss_type", "exo_pair needs label_smoothing above 0; its paper recommends 1e-3")
        if self.lora is not None and options.get("sync_ref_model"):
            raise wrong_at(
                "train.sync_ref_model", "does not work with lora, whose reference is the model without the adapter"
            )
        lora = {} if self.lora is None else self.lora.model_dump()
        if lora.get("init_lora_weights") is False:
            raise wrong_at("lora.init_lora_weights", "false starts from another model than the reference; use true")
        if lora.get("bias", "none") != "none":
            raise wrong_at("lora.bias", "would train the reference's biases as well; leave it out")
        return self

    def rows(self, path: Path, split: str, report: RowReport | None = None) -> Iterator[tuple[int, Pair]]:
        data = self.data
        return read_pairs(path, data.reading(split, data.format), data.rejected, self.seed, report)
