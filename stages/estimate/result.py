"""Inputs and result of an estimate. Importing it imports no torch, so the command can read a result quickly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel

from stages.base import UserError
from stages.models.model_folder import why_not_loaded

STARTUP = 10.0  # seconds to import libraries, read data and load a model, measured with recipes/wit_dpo.yaml
SPEED = {"cpu": 2.5e10, "cuda": 1e14}  # FLOPs per second of a CPU thread, measured with it too, and of a GPU, a guess


class Memory(BaseModel, frozen=True):
    """Bytes on each device at the peak, by part; `loading` is what loading needs beyond the other parts."""

    weights: int
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    logits: int = 0
    loading: int = 0
    libraries: int = 0

    @property
    def total(self) -> int:
        """Return the sum of the parts."""
        return sum(self.model_dump().values())


class Disk(BaseModel, frozen=True):
    """Bytes that stay in the store, and bytes of checkpoints while the step runs."""

    published: int = 0
    checkpoints: int = 0


class Remedy(BaseModel, frozen=True):
    """Changes of the recipe with which a step fits, its bytes then, and whether they keep its result."""

    changes: list[str]
    memory: int
    same_result: bool


class Estimate(BaseModel, frozen=True):
    """Cost of one step. An unknown value is None, and `unknown` gives the reason."""

    parameters: int | None = None
    trainable: int | None = None
    memory: Memory | None = None
    room: int = 0  # bytes of `room_of`, a device; 0 if there is none to compare with
    room_of: str = ""
    remedies: list[Remedy] = []
    disk: Disk = Disk()
    optimiser_steps: int | None = None
    requests: int | None = None
    tokens: int | None = None  # over all devices, without padding; generated tokens at their maximum
    flops: float | None = None
    formula: str = ""
    seconds: float | None = None
    speed: str = ""
    unknown: list[str] = []
    notes: list[str] = []

    @property
    def fits(self) -> bool | None:
        """Return whether the memory suffices, None if that is unknown."""
        return self.memory.total <= self.room if self.memory and self.room else None


class EstimateInputs(BaseModel, frozen=True):
    """All that a kind's `estimate` reads besides the stage's config; `missing` gives reasons for missing inputs."""

    paths: dict[str, Path]
    missing: dict[str, str] = {}
    dtype: str  # of the model's weights; `auto` is the checkpoint's
    device: Literal["cpu", "cuda"] = "cpu"
    room: int
    room_of: str = "this machine"
    threads: int
    scratch: Path  # an empty folder

    def on_this_device(self) -> Self:
        """Return the same inputs with this machine's GPU, if it has one."""
        import torch

        if not torch.cuda.is_available():
            return self
        gpu = torch.cuda.get_device_properties(0)
        return self.model_copy(update={"device": "cuda", "room": gpu.total_memory, "room_of": f"each {gpu.name}"})

    def values(self) -> dict[str, Any]:
        """Return the values of an estimate that need no model."""
        unknown = [f"all that depends on {name}: {reason}" for name, reason in self.missing.items()]
        return {"room": self.room, "room_of": self.room_of, "unknown": unknown}

    def duration(self, flops: float, processes: int) -> dict[str, Any]:
        """Return seconds at a usual speed, and how they are computed."""
        speed = SPEED[self.device] * (self.threads if self.device == "cpu" else processes)
        source = f"a rough guess: {STARTUP:.0f} s to start, {speed / 1e9:,.0f} GFLOP/s"
        return {"seconds": STARTUP + flops / speed, "speed": source}


def attempt(unknown: list[str], values: str, compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns, or None after adding its error to `unknown`; raise an error at a recipe key."""
    try:
        return compute()
    except Exception as error:  # models, tokenizers and tasks raise anything
        if isinstance(error, UserError) and error.key:
            raise
        unknown.append(f"{values}: {why_not_loaded(error)}")
