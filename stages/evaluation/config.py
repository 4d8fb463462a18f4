"""Config that the stages which score models share. Imports no torch, because every plan imports it."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator

from stages.base import Config, Items, Need, StageConfig, UserError
from stages.models.model_folder import REMOTE_CODE

BUDGETS = {"cpu": 512, "cuda": 8192}
"""Tokens of a pass, by device, unless the stage sets batch_size."""
GENERATION_TOKENS = 32
"""Tokens in the cache of a batch that generates, for each token of the budget."""
FEWEST_TOKENS = 64
"""Smallest batch_size; with fewer tokens, most of the time passes between passes."""


def unique(names: list[str]) -> list[str]:
    """Return `names`. Raises ValueError if a name occurs more than once."""
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"named more than once: {', '.join(duplicates)}")
    return names


def unique_by(attribute: str) -> AfterValidator:
    """Create the validator of a list whose entries must differ in `attribute`."""

    def validate(entries: list[Any]) -> list[Any]:
        unique([getattr(entry, attribute) for entry in entries])
        return entries

    return AfterValidator(validate)


class ModelOptions(Config):
    """How a model answers."""

    batch_size: int | None = None
    """Tokens of a forward pass. Affects speed and memory, and scores by rounding only. None: 512 on CPUs, 8192 on GPUs,
    and less where memory runs out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights; `auto` is the checkpoint's."""

    @field_validator("batch_size")
    @classmethod
    def _counts_tokens(cls, batch_size: int | None) -> int | None:
        if batch_size is not None and batch_size < FEWEST_TOKENS:
            raise ValueError(f"counts the tokens of a pass, not requests; leave it out, or set {FEWEST_TOKENS} or more")
        return batch_size


class EvaluationStage(StageConfig):
    """A stage that scores models, one step per model, so that no model is scored twice."""

    output_kind: ClassVar[Literal["scores"]] = "scores"

    models: Annotated[list[str], Field(min_length=1), AfterValidator(unique)]
    """Names of stages, `base`, or references to models."""
    trust_remote_code: bool = False
    """Run the Python files that come with a model that transformers does not know, and the metrics that evaluate loads
    from the hub. They can do anything on this machine that you can do."""

    def needs(self) -> dict[str, Need]:
        return {
            "model" if i == 0 else f"model.{i}": Need("model", model, f"models.{i}", self.trust_remote_code)
            for i, model in enumerate(self.models)
        }

    @property
    def can_share_gpu(self) -> bool:
        """As for any stage, but vLLM takes most of a GPU by itself."""
        return super().can_share_gpu and getattr(getattr(self, "options", None), "backend", "hf") == "hf"

    def measured_items(self) -> list[Items]:
        return [Items(need.key, name) for name, need in self.needs().items() if need.kind == "data"]

    def split(self) -> dict[str, Self]:
        return {f"[{model}]": self.model_copy(update={"models": [model]}) for model in self.models}

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        return [REMOTE_CODE] if self.trust_remote_code else []


def require_vllm(backend: str) -> None:
    """Raise UserError if `backend` is vllm and vllm is not installed."""
    if backend == "vllm" and find_spec("vllm") is None:
        raise UserError("is 'vllm', which is not installed; pip install -e '.[vllm]'", "options.backend")
