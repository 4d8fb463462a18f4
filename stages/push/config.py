"""The `push` section of a recipe: which model goes to which repository of the hub.

Light by intent: the hub's client is imported where a step is about to run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import BASE, Need, Resources, StageConfig


class PushStage(StageConfig):
    """Uploads a trained model, with its card, to the hub: the only thing that ever uploads one."""

    kind: ClassVar[str] = "push"
    output_kind: ClassVar[Literal["record"]] = "record"
    version: ClassVar[int] = 1
    writes_to: ClassVar[str | None] = "repo"

    model: str
    """The stage whose model is uploaded."""
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """`owner/name` on the hub; made where it is not there."""
    private: bool = True
    """Whether others do not see it."""
    results: list[str] = Field(default_factory=list)
    """Stages that score models: what they found of this one stands in the card."""
    license: str | None = Field(default=None, min_length=1)
    """The hub's word for it, such as apache-2.0; none is told unless given."""
    resources: Resources = Resources(gpus=0)

    @field_validator("model")
    @classmethod
    def _is_a_stage(cls, model: str) -> str:
        if model == BASE or "/" in model or ":" in model:
            raise ValueError(f"{model!r} was not trained by this recipe; name the stage whose model is to be uploaded")
        return model

    def needs(self) -> dict[str, Need]:
        """The model, and the steps that scored models."""
        scores = {
            f"results.{i}": Need("steps", name, f"results.{i}", of="model") for i, name in enumerate(self.results)
        }
        return {"model": Need("model", self.model, "model"), **scores}

    def check(self, files: dict[str, Path]) -> None:
        """Whether the hub lets us write there, before anything is trained for it. Raises UserError."""
        _require_once(self.repo)

    def asks(self, files: dict[str, Path]) -> list[str]:
        """The upload."""
        return [f"uploads the model to {self.repo} on the hub, {'private' if self.private else 'public'}"]


@cache
def _require_once(repo: str) -> None:
    """Ask the hub once for all the steps that upload there. Raises UserError."""
    from stages.push.hub import require_access  # the client takes a tenth of what a plan may take

    require_access(repo)
