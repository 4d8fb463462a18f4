"""The `characteristics` section of a recipe. Imports no torch, because every plan imports it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.base import Config, Items, Need
from stages.data.formats import Row
from stages.data.reader import read_examples
from stages.evaluation.config import EvaluationStage, ModelOptions, unique_by
from stages.models.model_folder import check_model
from stages.training.config import SFTData


class PromptSet(Config):
    """Prompts from one source."""

    name: str = Field(pattern=r"^\w[\w.-]{0,99}$")
    """The name in the report. For a benchmark's prompts, the name of its task, so that the report pairs the two."""
    role: Literal["train", "eval"]
    """Whether the prompts train models or evaluate them."""
    data: SFTData
    """`train` names the file; the other keys are those of an sft stage."""


class Options(ModelOptions):
    """Number of rows, and how the model reads them."""

    limit: int | None = Field(default=None, ge=1)
    """Read only the first rows of each set, up to this number."""


class CharacteristicsStage(EvaluationStage):
    """Properties of prompts that the report correlates with the best prompt weight. Scores no model."""

    kind: ClassVar[str] = "characteristics"
    version: ClassVar[int] = 4
    is_forked: ClassVar[bool] = True
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ("options.batch_size",)

    sets: Annotated[list[PromptSet], Field(min_length=1), unique_by("name")]
    """The prompts to describe."""
    options: Options = Options()

    def needs(self) -> dict[str, Need]:
        files = {f"data.{s.name}": Need("data", s.data.train, f"sets.{i}.data.train") for i, s in enumerate(self.sets)}
        return super().needs() | files

    def measured_items(self) -> list[Items]:
        return []

    def rows(self, prompt_set: PromptSet, path: Path) -> Iterator[Row]:
        """Read the rows of a set. Raises UserError for bad rows, unless the set drops them."""
        data = prompt_set.data
        for count, (_, row) in enumerate(read_examples(path, data.reading("train", data.format))):
            if count == self.options.limit:
                return
            yield row

    def check(self, files: dict[str, Path]) -> None:
        check_model(files["model"], self.trust_remote_code, "models")
        for prompt_set in self.sets:
            path = files[f"data.{prompt_set.name}"]
            prompt_set.data.check_splits({"train": path})
            for _ in self.rows(prompt_set, path):
                pass
