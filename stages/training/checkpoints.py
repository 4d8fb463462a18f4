"""Checkpoints of a training: when to save one, which one to resume from, and the sums that transformers does not save.

transformers saves and restores the model, the optimiser, the schedule, the random number generators and the position in
the data. With the sums behind the next log restored as well, a resumed training ends with the same bytes as one that
was never interrupted.
"""

import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from stages.system.integrity import SEAL, broken_seal, read_json, seal, write_json
from stages.training.trainer_internals import TRLTrainer, read_sums, restore_sums

MIN_INTERVAL = 5.0
"""Seconds until the first checkpoint, unless the recipe sets save_steps: early, to show whether the disk has room."""
MAX_INTERVAL = 1800.0  # longest time between two checkpoints, in seconds
MAX_OVERHEAD = 0.01  # share of the training time that later checkpoints may cost
CHECKPOINTS_KEPT = 2  # while one is being written, the one before is the last complete one

_VERSIONED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
"""A checkpoint of another version of one of these is not used."""


class Checkpoints(TrainerCallback):
    """Saves checkpoints of a trainer, and restores the sums that transformers does not.

    Args:
        trainer: Its output_dir holds the checkpoints.
        by_steps: Save every save_steps steps; otherwise by the clock.
        sums: Running sums of our own, restored in place.
    """

    def __init__(self, trainer: TRLTrainer, by_steps: bool, sums: Mapping[str, torch.Tensor]) -> None:
        self.trainer, self.by_steps, self.sums = trainer, by_steps, sums
        self.folder = Path(str(trainer.args.output_dir))
        self.earlier_seconds = 0.0
        """Training time of the attempts before this one."""
        self._started = self._last_save = self._save_started = time.monotonic()
        self._interval, self._saved_step = MIN_INTERVAL, 0
        self.resume_from, self.notes = self._select()
        """The checkpoint to resume from, if there is one, and notes for the user."""

    def _select(self) -> tuple[Path | None, list[str]]:
        """Select the last usable checkpoint, the same on every rank. Remove unusable ones after it."""
        usable: Path | None = None
        notes: list[str] = []
        folders = self.folder.glob("checkpoint-*") if self.trainer.is_world_process_zero() else ()
        for step, checkpoint in sorted(((int(f.name.rpartition("-")[2]), f) for f in folders), reverse=True):
            if (problem := _problem(checkpoint)) is None:
                usable = checkpoint
                notes.append(f"resumed from step {step}, where an earlier attempt was interrupted")
                break
            if (checkpoint / SEAL).exists():  # without a seal, the process was killed while writing it: no news
                notes.append(f"{checkpoint.name} is not used: {problem}")
            shutil.rmtree(checkpoint)
        selection: Any = broadcast_object_list([usable, notes])
        return selection[0], selection[1]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._last_save = time.monotonic()
        self._saved_step = state.global_step
        if self.resume_from is None:
            return
        saved = read_json(self._sums_file(self.resume_from))
        restore_sums(self.trainer, saved, args.device)
        for name, tensor in self.sums.items():
            tensor.copy_(torch.tensor(saved["sums"][name], dtype=tensor.dtype))
        self.earlier_seconds = saved["seconds"]
        if state.best_global_step:  # transformers saves an absolute path, and the folder may have been moved
            state.best_model_checkpoint = str(self.folder / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save now. The last step needs no checkpoint, because the finished model is published."""
        if self.by_steps:  # if `select` skips a save, it is due at the next step
            due = state.global_step // state.save_steps > self._saved_step // state.save_steps
        else:
            (due,) = broadcast_object_list([time.monotonic() - self._last_save >= self._interval])  # of rank 0's clock
        control.should_save = due and state.global_step < state.max_steps
        self._save_started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save_started = time.monotonic()  # an evaluation before it is no cost of saving

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the sums to the checkpoint that transformers has written, and seal it.

        That of the last step is not sealed, because a training cannot resume from there; it has the best model.
        """
        self._saved_step = state.global_step
        if state.global_step == state.max_steps:
            return
        trainer, checkpoint = self.trainer, self.folder / f"checkpoint-{state.global_step}"
        own_sums = {name: tensor.tolist() for name, tensor in self.sums.items()}
        write_json(self._sums_file(checkpoint), read_sums(trainer) | {"sums": own_sums, "seconds": self.elapsed()})
        trainer.accelerator.wait_for_everyone()  # every rank has written its part
        if trainer.is_world_process_zero():
            seal(checkpoint, **{"made_by": _versions()})
            if args.load_best_model_at_end:  # transformers would delete before the new one is sealed
                rotate_checkpoints(str(self.folder), 1, state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
        self._last_save = time.monotonic()
        cost = self._last_save - self._save_started
        self._interval = min(max(MIN_INTERVAL, cost / MAX_OVERHEAD), MAX_INTERVAL)

    def elapsed(self) -> float:
        """Return the training time of all attempts, in seconds."""
        return self.earlier_seconds + time.monotonic() - self._started

    def _sums_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"sums-{self.trainer.args.process_index}.json"


def _problem(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a checkpoint; None if it can."""
    if broken := broken_seal(checkpoint):
        return broken
    before, now = read_json(checkpoint / SEAL)["made_by"], _versions()
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        return f"it was written with other versions ({', '.join(changed)})"
    best = checkpoint.with_name(f"checkpoint-{read_json(checkpoint / TRAINER_STATE_NAME)['best_global_step']}")
    if best.name not in (checkpoint.name, "checkpoint-None") and (damage := broken_seal(best)):
        return f"{best.name}, the best point before it: {damage}"
    return None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _VERSIONED_PACKAGES}
