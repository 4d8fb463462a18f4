"""The `characteristics` section of a recipe: which prompts to describe.

Light on purpose: imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import Config, Need
from stages.data.formats import Row
from stages.data.reader import read_examples
from stages.evaluation.config import EvaluationStage, repeated
from stages.models.model_folder import REMOTE_CODE, check_model
from stages.sft.config import SFTData


class PromptSet(Config):
    """Prompts of one origin."""

    name: str = Field(pattern=r"^\w[\w.-]{0,99}$")
    """What to call them; for prompts of a benchmark its task's name, by which the report finds its best weights."""
    role: Literal["train", "eval"]
    """Whether models were tuned on them or are measured by them."""
    data: SFTData
    """`train` names the file; the other keys are those of an sft stage."""


class Options(Config):
    """How they are described."""

    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows of each set."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts computed together."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is that of the checkpoint."""


class CharacteristicsStage(EvaluationStage):
    """What the paper correlates the best prompt weight with; no score of a model."""

    kind: ClassVar[str] = "characteristics"
    version: ClassVar[int] = 1
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ("options.batch_size",)

    sets: list[PromptSet] = Field(min_length=1)
    """The prompts to describe, by where they come from."""
    options: Options = Options()

    @field_validator("sets")
    @classmethod
    def _names_differ(cls, sets: list[PromptSet]) -> list[PromptSet]:
        if found := repeated([each.name for each in sets]):
            raise ValueError(f"named more than once: {', '.join(found)}")
        return sets

    def needs(self) -> dict[str, Need]:
        """The models, and every file."""
        files = {f"data.{s.name}": Need("data", s.data.train, f"sets.{i}.data.train") for i, s in enumerate(self.sets)}
        return super().needs() | files

    def rows(self, given: PromptSet, path: Path) -> Iterator[Row]:
        """The rows of a set, bad ones told or left out as it says. Raises UserError."""
        for count, (_, row) in enumerate(read_examples(path, given.data.reading("train", given.data.format))):
            if count == self.options.limit:
                return
            yield row

    def check(self, files: dict[str, Path]) -> None:
        """Whether the model can be loaded and every row read."""
        check_model(files["model"], self.trust_remote_code, "models")
        for given in self.sets:
            given.data.check_splits({"train": files[f"data.{given.name}"]})
            for _ in self.rows(given, files[f"data.{given.name}"]):
                pass

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's."""
        return [REMOTE_CODE] if self.trust_remote_code else []
