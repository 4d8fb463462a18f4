"""What the stages that score models share: which models, one step for each.

Light by intent: imports no torch.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator

from stages.base import Need, StageConfig, UserError


class EvaluationStage(StageConfig):
    """Scores models; one step for each, so that a model once measured is never measured again."""

    output_kind: ClassVar[Literal["scores"]] = "scores"

    models: list[str] = Field(min_length=1)
    """Names of stages, `base`, or references to models."""
    trust_remote_code: bool = False
    """Run the Python files that come with a model, for one that transformers does not know, and metrics that evaluate
    loads from the hub: they can do on this machine whatever you can do."""

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: list[str]) -> list[str]:
        if found := repeated(models):
            raise ValueError(f"named more than once: {', '.join(found)}")
        return models

    def needs(self) -> dict[str, Need]:
        """The model under `model`; further ones, before the split, under `model.1` and so on."""
        return {
            "model" if i == 0 else f"model.{i}": Need("model", model, f"models.{i}", self.trust_remote_code)
            for i, model in enumerate(self.models)
        }

    def split(self) -> dict[str, Self]:
        """One step per model."""
        return {f"[{model}]": self.model_copy(update={"models": [model]}) for model in self.models}


def require_vllm(backend: str) -> None:
    """Raise UserError where that is asked for and not installed."""
    if backend == "vllm" and find_spec("vllm") is None:
        raise UserError("is 'vllm', which is not installed; pip install -e '.[vllm]'", "options.backend")


def repeated(names: list[str]) -> list[str]:
    """Those that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
