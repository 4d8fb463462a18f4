"""What a `dpo` stage's section of a recipe may say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.options import Options, options
from stages.reading import read_pairs
from stages.rows import PAIR_COLUMNS, Pair, columns_of
from stages.training_config import TrainingData, TrainingStage

if TYPE_CHECKING:
    DPOOptions = Options
else:
    DPOOptions = options("DPOConfig")


class DPOData(TrainingData):
    """The preference pairs of a dpo stage."""

    format: Literal["auto", "prompt_completion", "alpaca", "official"] = "auto"
    """What the columns of instruction data mean, where `rejected` makes pairs of it."""
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
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.dpo.stage:run"

    data: DPOData
    train: DPOOptions = Field(default_factory=DPOOptions)
    """Fields of TRL's DPOConfig; stages.options says which are refused, and why."""

    def rows(self, path: Path, part: str, dropped: list[str] | None = None) -> Iterator[tuple[int, Pair]]:
        """(number in the file, pair) for the data at `path`, named as `part`; TrainingStage.rows says more."""
        data = self.data
        return read_pairs(path, data.reading(part, data.format), data.rejected, self.seed, dropped)
