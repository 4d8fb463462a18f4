"""The `push` section of a recipe: which model to upload to which repository of the hub."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import BASE, Need, Resources, StageConfig


class PushStage(StageConfig):
    """Uploads a trained model, with its card, to the hub. No other stage uploads a model."""

    kind: ClassVar[str] = "push"
    output_kind: ClassVar[Literal["record"]] = "record"
    version: ClassVar[int] = 1
    writes_to: ClassVar[str | None] = "repo"

    model: str
    """The stage whose model is uploaded."""
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """`owner/name` on the hub; created if it does not exist."""
    private: bool = True
    """Whether the repository is private."""
    results: list[str] = Field(default_factory=list)
    """Stages that score models. The card lists their scores of this model."""
    license: str | None = Field(default=None, min_length=1)
    """The license in the card, as the hub names it, such as apache-2.0. Absent: the card names none."""
    resources: Resources = Resources(gpus=0)

    @field_validator("model")
    @classmethod
    def _is_a_stage(cls, model: str) -> str:
        if model == BASE or "/" in model or ":" in model:
            raise ValueError(f"{model!r} was not trained by this recipe; name the stage that trains the model")
        return model

    def needs(self) -> dict[str, Need]:
        scores = {
            f"results.{i}": Need("steps", name, f"results.{i}", model_need="model")
            for i, name in enumerate(self.results)
        }
        return {"model": Need("model", self.model, "model"), **scores}

    def check_services(self) -> None:
        from stages.push.hub import require_access  # importing the client would slow down every plan

        require_access(self.repo)

    def paid_requests(self, files: dict[str, Path]) -> list[str]:
        return [f"uploads the model to {self.repo} on the hub, {'private' if self.private else 'public'}"]
