"""The config of a stage that publishes one empty file, for benchmarks.scale."""

from typing import ClassVar, Literal

from stages.base import Need, StageConfig


class NothingStage(StageConfig):
    """Publishes one empty file."""

    kind: ClassVar[str] = "nothing"
    output_kind: ClassVar[Literal["model"]] = "model"
    version: ClassVar[int] = 1

    value: float

    def needs(self) -> dict[str, Need]:
        """No inputs."""
        return {}
