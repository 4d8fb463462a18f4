"""What an estimator is given and what it answers. Light by intent: the command reads the answers without torch.

What is not known is None, and `unknown` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A part of an answer; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class Memory(Answer):
    """Bytes that each device holds at the moment when it holds most, by part."""

    weights: int
    """Of all models that are held, a reference and an adapter among them."""
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    """What the backbone holds beside those: kept for the backward pass, temporary, or keys and values of a
    generation."""
    logits: int = 0
    """What the head adds at its peak: logits, their gradients, that of the head's own weights while it is made."""
    loading: int = 0
    """What loading or merging holds for a moment beyond all of that."""
    libraries: int = 0
    """Python, torch and what the stage imports; none of a GPU's memory."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.model_dump().values())


class Disk(Answer):
    """Bytes."""

    published: int = 0
    """What stays in the store."""
    checkpoints: int = 0
    """At most, while the step runs."""


class Remedy(Answer):
    """Changes of a recipe that make a stage fit."""

    changes: list[str]
    memory: int
    """Of each device, in bytes, with them."""
    same_result: bool
    """Whether the stage's result stays what it would be, up to rounding."""


class Estimate(Answer):
    """What one step takes."""

    parameters: int | None = None
    trainable: int | None = None
    """None for a step that trains nothing, too."""
    memory: Memory | None = None
    room: int = 0
    """Bytes that there are on each device."""
    room_of: str = ""
    """What has them."""
    remedies: list[Remedy] = []
    """Where it does not fit: the first few that do."""
    disk: Disk = Disk()
    optimiser_steps: int | None = None
    requests: int | None = None
    tokens: int | None = None
    """Without padding, over all devices; of an evaluation, of all that is read and at most generated."""
    flops: float | None = None
    formula: str = ""
    """How `flops` was computed."""
    seconds: float | None = None
    speed: str = ""
    """Where `seconds` come from."""
    unknown: list[str] = []
    notes: list[str] = []

    @property
    def fits(self) -> bool | None:
        """Whether the memory is there; None where that is not known."""
        return None if self.memory is None or not self.room else self.memory.total <= self.room


@dataclass(frozen=True)
class Finished:
    """A step that this folder of runs has, of the same kind, from the same model."""

    step: str
    seconds: float
    tokens: int | None
    """None for an evaluation, which then is of the same tasks and settings."""


@dataclass(frozen=True)
class Given:
    """All that an estimator sees beside the stage's section of the recipe."""

    paths: dict[str, Path]
    """Inputs that are here; the model is the one that the chain of trainings begins with, perhaps without weights."""
    missing: dict[str, str]
    """The others, and why they are not here."""
    dtype: str | None
    """Of the model's weights, where a training makes it."""
    device: Literal["cpu", "cuda"]
    room: int
    room_of: str
    libraries: int
    threads: int
    """How many threads a step has on a CPU."""
    finished: Finished | None
    scratch: Path
    """An empty folder."""
