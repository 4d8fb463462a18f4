"""Try the longest batch of a training before its first step, so that out-of-memory comes at once, with what would fit.

The forward and backward pass of the longest rows run in the trainer itself, beside as much memory as the state of the
optimiser will need; with gradient accumulation, a second time beside the gradients. Weights, buffers, gradients, random
numbers and the trainer's figures are afterwards what they were. A sharded training (FSDP, DeepSpeed) is not tried.
"""

import copy
import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
import pyarrow.compute
import torch
from transformers import TrainerCallback

from stages.base import Context, UserError
from stages.models.model_size import model_size, optimiser_bytes
from stages.system.memory import peak_memory
from stages.training.trainer_internals import TRLTrainer, preserved_figures


@dataclass(frozen=True)
class LongestBatch:
    """A batch that was tried, with its time and the peak memory of the process."""

    rows: int
    tokens: int
    """Of the longest row."""
    seconds: float
    memory: str


class Probed(Exception):
    """Ends a training that only tries its longest batch, its argument."""


class Probe(TrainerCallback):
    """Tries the longest batch when the trainer is ready to train, and ends the training if it does nothing else."""

    def __init__(self, trainer: TRLTrainer, context: Context) -> None:
        self.trainer, self.context = trainer, context

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.progress(0, state.max_steps, "trying the longest rows")
        batch = try_longest_batch(self.trainer)
        if self.context.only_probe:
            raise Probed(batch)


def probe(context: Context) -> dict[str, Any]:
    """Try the longest batch of a step in this process; return the LongestBatch as JSON. Raises UserError."""
    launch = context.config.launch
    if launch is not None and launch.sharding is not None:
        return {}
    options = context.config.train.model_copy(update={"report_to": "none"})
    config = context.config.model_copy(update={"train": options})
    try:
        config.load("run")(replace(context, config=config, only_probe=True))
    except Probed as probed:
        return asdict(probed.args[0])
    raise AssertionError("the training did not try its longest batch")


def try_longest_batch(trainer: TRLTrainer) -> LongestBatch:
    """Run one forward and backward pass on the longest rows. Raises UserError, with what fits, if they do not."""
    args: Any = trainer.args
    dataset = trainer.train_dataset
    assert dataset is not None
    lengths = _lengths(dataset).clip(max=args.max_length)
    count = min(args.per_device_train_batch_size, len(lengths))
    longest = numpy.argsort(-lengths, kind="stable")[:count].tolist()
    rows, tokens = [dataset[index] for index in longest], int(lengths[longest[0]])
    if batch := _attempt(trainer, rows, tokens):
        return batch
    place = (
        f"a step with the {count} longest rows, of up to {tokens:,} tokens, does not fit in the memory of this device"
    )
    smaller = count
    while smaller > 1:
        smaller //= 2
        if batch := _attempt(trainer, rows[:smaller], tokens):
            accumulation = -(-count * args.gradient_accumulation_steps // smaller)
            raise UserError(
                f"{place}; {smaller} fit, with {batch.memory}: set it to {smaller} and"
                f" train.gradient_accumulation_steps to {accumulation}, for the same rows in a step",
                "train.per_device_train_batch_size",
            )
    shorter = tokens
    while shorter > 16:
        shorter //= 2
        if batch := _attempt(trainer, [_cut(rows[0], shorter / tokens)], shorter):
            raise UserError(
                f"{place}, nor does one of them; a row of {shorter:,} tokens does, with {batch.memory}: set"
                f" train.activation_checkpointing to true, or train.max_length to {shorter}",
                "train.max_length",
            )
    raise UserError(
        f"{place}, nor does a row of {shorter} tokens; use lora, a smaller model or a larger device", "model"
    )


def _lengths(dataset: Any) -> numpy.ndarray:
    """Tokens of each row, or of the longer sequence of each pair."""
    table = dataset.with_format("arrow")[:]

    def tokens(column: str) -> numpy.ndarray:
        return pyarrow.compute.list_value_length(table[column]).to_numpy()

    if "input_ids" in table.column_names:
        return tokens("input_ids")
    return tokens("prompt_ids") + numpy.maximum(tokens("chosen_ids"), tokens("rejected_ids"))


def _cut(row: dict[str, Any], share: float) -> dict[str, Any]:
    """A row with a share of its tokens."""
    cut = {
        name: value[: int(len(value) * share) + 1] if isinstance(value, list) else value for name, value in row.items()
    }
    return cut | ({"seq_lengths": [len(cut["input_ids"])]} if "seq_lengths" in row else {})


def _attempt(trainer: TRLTrainer, rows: Sequence[dict[str, Any]], tokens: int) -> LongestBatch | None:
    """Run the pass; return None if the memory does not suffice."""
    device, start = trainer.accelerator.device, time.perf_counter()
    try:
        with _unchanged(trainer):
            size = optimiser_bytes(str(trainer.args.optim), model_size(trainer.model))
            _state = torch.ones(size, dtype=torch.uint8, device=device)  # filled, so that it takes memory on a CPU too
            for _ in range(2 if trainer.args.gradient_accumulation_steps > 1 else 1):
                inputs = trainer.data_collator(list(rows))
                items = inputs["labels"][..., 1:].ne(-100).sum() if "labels" in inputs else None
                with trainer.accelerator.no_sync(trainer.model_wrapped):
                    trainer.training_step(trainer.model_wrapped, inputs, items)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            memory = peak_memory()
        return LongestBatch(len(rows), tokens, round(time.perf_counter() - start, 2), memory)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None


@contextmanager
def _unchanged(trainer: TRLTrainer) -> Iterator[None]:
    """Restore everything that a pass changes and a training reads."""
    model, device = trainer.model, trainer.accelerator.device
    assert model is not None
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = random.getstate(), numpy.random.get_state(), copy.copy(trainer.state)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), preserved_figures(trainer):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        trainer.state = states[2]
        for buffer, value in buffers:
            buffer.data.copy_(value)
        model.zero_grad(set_to_none=True)
