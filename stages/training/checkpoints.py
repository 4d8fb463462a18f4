"""Checkpoints of a training: saved as it goes, checked before another attempt goes on from one.

transformers saves and restores the model, the optimiser, the schedule, the random number generators and the place in
the data; here stands what it leaves out: when to save, whether a checkpoint is whole, and the sums that the next log
and the final figures are made of. A training that was interrupted then ends with the bytes of one that was not.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from stages.system.integrity import SEAL, broken_seal, read_seal, seal, write_json

FIRST_SECONDS = 5.0
"""When the first is saved, unless the recipe sets save_steps: early, for it also shows whether the disk has room."""
SHARE = 0.01
"""Of the training time that saving may take from then on."""
MOST_SECONDS = 1800.0
"""The longest time between two of them, whatever share saving takes."""
CHECKPOINTS_KEPT = 2
"""How many are kept: while one is being written, the one before is the last that is complete."""

_MADE_BY = ("torch", "transformers", "trl", "peft", "accelerate")


class Checkpoints(TrainerCallback):
    """Saves checkpoints of `trainer`, and restores from one what transformers does not.

    Args:
        trainer: saves to its own output_dir.
        by_steps: every save_steps steps; else by the clock.
        sums: running sums beyond TRL's own, restored in place.
    """

    def __init__(self, trainer: SFTTrainer | DPOTrainer, by_steps: bool, sums: dict[str, torch.Tensor]) -> None:
        self.trainer, self.by_steps, self.sums = trainer, by_steps, sums
        self.folder = Path(str(trainer.args.output_dir))
        self.found: Path | None = None
        """The checkpoint to go on from."""
        self.notes: list[str] = []
        """What a user would want to know of it."""
        self.seconds = 0.0
        """Of training, in the attempts before."""
        self._began = self._last = time.monotonic()
        self._wait = FIRST_SECONDS
        self._find()

    def _find(self) -> None:
        """The last whole checkpoint; those that cannot be used are named and removed. All ranks find the same."""
        found: list[Any] = [None, []]
        if self.trainer.is_world_process_zero():
            there = self.folder.glob("checkpoint-*")
            for place in sorted(there, key=lambda place: int(place.name.rpartition("-")[2]), reverse=True):
                if found[0] is None and (why := _unusable(place)) is None:
                    found[0] = str(place)
                elif found[0] is None:
                    if (place / SEAL).exists():  # one that was being written when the process was killed is no news
                        found[1].append(f"{place.name} is not used: {why}")
                    shutil.rmtree(place)
        broadcast_object_list(found)
        if found[0] is not None:
            self.found = Path(found[0])
            step = self.found.name.rpartition("-")[2]
            found[1].append(f"went on from step {step}, where an earlier attempt was interrupted")
        self.notes = found[1]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the sums."""
        self._began = self._last = time.monotonic()
        if self.found is None:
            return
        saved = json.loads(self._sums_file(self.found).read_text(encoding="utf-8"))
        trainer = self.trainer
        trainer._initial_global_step = 0  # the figures are of the whole training, not of this attempt
        trainer._tr_loss = torch.tensor(saved["loss"], device=args.device)
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        trainer._total_train_tokens = saved["tokens"]
        trainer._metrics["train"].update(saved["metrics"])
        for name, tensor in self.sums.items():
            tensor.copy_(torch.tensor(saved["sums"][name], dtype=tensor.dtype))
        self.seconds = saved["seconds"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save now; never after the last step, for the finished model is published."""
        due = state.global_step % state.save_steps == 0 if self.by_steps else self._is_time()
        control.should_save = due and state.global_step < state.max_steps
        self._asked = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete what transformers has saved, and seal it."""
        trainer, place = self.trainer, self.folder / f"checkpoint-{state.global_step}"
        metrics = {name: values for name, values in trainer._metrics["train"].items() if values}
        saved = {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "tokens": int(trainer._total_train_tokens),
            "metrics": metrics,
            "sums": {name: tensor.tolist() for name, tensor in self.sums.items()},
            "seconds": self.seconds + time.monotonic() - self._began,
        }
        write_json(self._sums_file(place), saved)
        trainer.accelerator.wait_for_everyone()  # every rank has written its part
        if trainer.is_world_process_zero():
            seal(place, made_by=_made_by())
        trainer.accelerator.wait_for_everyone()
        self._last = time.monotonic()
        self._wait = min(max(FIRST_SECONDS, (self._last - self._asked) / SHARE), MOST_SECONDS)

    def elapsed(self) -> float:
        """Seconds of training, in all attempts."""
        return self.seconds + time.monotonic() - self._began

    def _is_time(self) -> bool:
        due = [time.monotonic() - self._last >= self._wait]
        broadcast_object_list(due)  # as rank 0's clock has it
        return due[0]

    def _sums_file(self, place: Path) -> Path:
        return place / f"sums-{self.trainer.args.process_index}.json"


def _unusable(place: Path) -> str | None:
    """Why training cannot go on from the checkpoint in `place`; None where it can."""
    if broken := broken_seal(place):
        return broken
    before, now = read_seal(place)["made_by"], _made_by()
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    return f"it was written with other versions ({', '.join(changed)})" if changed else None


def _made_by() -> dict[str, str]:
    return {name: metadata.version(name) for name in _MADE_BY}
