"""The `sensitivity` section of a recipe. Imports no torch, because every plan imports it."""

from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.base import Need
from stages.evaluation.config import EvaluationStage, ModelOptions, unique_by
from stages.models.model_folder import check_context, check_model
from stages.sensitivity.sets import Prompts, read_sets


class Options(ModelOptions):
    """Format of the requests, batches and formula."""

    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template. Worked examples become turns."""
    system_instruction: str | None = None
    """A system message before every prompt."""
    convention: Literal["paper", "package"] = "paper"
    """The formula. `package` is that of prompt-sensitivity-index 0.0.1, to compare with its numbers: it divides by
    max_new_tokens in place of the response's length, and scores for each prompt the responses to the others, where the
    paper scores each response under the other prompts."""


class SensitivityStage(EvaluationStage):
    """POSIX of models. A lower value means that the wording matters less."""

    kind: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 3
    is_forked: ClassVar[bool] = True

    prompts: Annotated[list[Prompts], Field(min_length=1), unique_by("name")]
    """Files of prompts with the same intent."""
    options: Options = Options()
    seed: int = 23
    """Seed of the spelling errors."""

    def needs(self) -> dict[str, Need]:
        needs = super().needs()
        for i, entry in enumerate(self.prompts):
            needs[f"data.{entry.name}"] = Need("data", entry.data, f"prompts.{i}.data")
            if entry.examples is not None:
                needs[f"examples.{entry.name}"] = Need("data", entry.examples, f"prompts.{i}.examples")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        check_model(files["model"], self.trust_remote_code, "models")
        for i, entry in enumerate(self.prompts):
            paths = tuple((name, path) for name, path in sorted(files.items()) if name.endswith(f".{entry.name}"))
            _check_rows(entry.model_dump_json(), paths, self.seed)
            check_context(files["model"], entry.max_new_tokens, f"prompts.{i}.max_new_tokens")


@cache
def _check_rows(entry: str, files: tuple[tuple[str, Path], ...], seed: int) -> None:
    read_sets(Prompts.model_validate_json(entry), dict(files), seed)
