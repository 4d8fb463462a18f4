"""Cost of a training stage, from the lengths of its rows and the size of its model."""

import json
import math
from itertools import islice
from typing import NamedTuple

from transformers import AutoTokenizer

from stages.data.tokenization import Preparer
from stages.estimate.result import Disk, Estimate, EstimateInputs, Memory, Remedy, attempt
from stages.models.model_size import (
    build,
    check_positions,
    checkpoint_bytes,
    model_size,
    optimiser_bytes,
    saved_activations,
)
from stages.training.config import DEFAULT_EPOCHS, TrainingStage
from stages.training.launch import Launch

SAMPLE = 1_000  # only the first so many rows are tokenised
TRAINING_PROCESS = 545 * 2**20
"""Bytes. Measured: the peak of `python -m benchmarks.estimate "full 1M"` less the other parts."""
ALLOCATOR = 1.2  # bytes that glibc holds for a byte of activations, measured by the case "full 135M"
AUTOCAST = 0.65  # share of the activations that is left in bfloat16, measured on a Llama of 135M parameters
LOGITS_CHUNK = 48 * 2**20  # bytes of the logits that stages.sft.head holds at a time, on CPUs
TILE, TILE_COPIES = (4096, 32768), {"cpu": 8, "cuda": 1}  # positions and vocabulary of a tile of TRL's fused head


class Rows(NamedTuple):
    """Training rows, their tokens, and those of the longest sequence."""

    total: int
    tokens: float
    longest: int


def shards(launch: Launch | None) -> tuple[int, ...]:
    """Return how many devices share weights, gradients and optimiser state. Offloading does not count."""
    options = launch.model_dump() if launch else {}
    zero_stage = int(options.get("zero_stage", 2)) if options.get("use_deepspeed") else 0
    if options.get("use_fsdp"):
        zero_stage = {"NO_SHARD": 0, "SHARD_GRAD_OP": 2}.get(options.get("fsdp_sharding_strategy", ""), 3)
    return tuple(options["num_processes"] if zero_stage >= first else 1 for first in (3, 2, 1))


def steps_per_epoch(stage: TrainingStage, rows: int) -> int:
    """Return the optimiser steps of one epoch, as transformers' Trainer counts them."""
    options, processes = stage.train_options, stage.launch.num_processes if stage.launch else 1
    batches = math.ceil(rows / (options["per_device_train_batch_size"] * processes))
    return max(1, math.ceil(batches / options["gradient_accumulation_steps"]))


def optimiser_steps(stage: TrainingStage, rows: int) -> int:
    """Return the optimiser steps of a training."""
    options = stage.train_options
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    return math.ceil(steps_per_epoch(stage, rows) * (options["num_train_epochs"] or DEFAULT_EPOCHS))


def estimate(stage: TrainingStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a training."""
    values = inputs.values()
    if "model" not in inputs.paths:
        return Estimate(**values)
    rows = attempt(values["unknown"], "tokens", lambda: _read_rows(stage, inputs)) if "train" in inputs.paths else None
    training = Training(stage, inputs, rows)
    size, steps, tokens = training.size, *training.steps_and_tokens()
    values |= {"parameters": size.base, "trainable": size.trainable, "optimiser_steps": steps, "tokens": tokens}
    if rows and rows.total > SAMPLE:
        values["notes"] = [f"tokens are those of the first {SAMPLE:,} of {rows.total:,} rows, scaled up"]
    checkpoints = checkpoint_bytes(training.options["optim"], size)
    published = training.base_bytes + (size.trainable_bytes if stage.lora else 0)
    values["disk"] = Disk(published=published, checkpoints=checkpoints)
    if tokens:  # 2 N forward, 2 N backward, 2 T for gradients; 2 N each to recompute activations and for the reference
        n, t = size.multiplied, min(size.trainable, size.multiplied)
        factor = 4 + 2 * bool(training.options["gradient_checkpointing"]) + 2 * stage.has_reference
        values["formula"] = f"{factor + 2} N for each token" if t == n else f"{factor} N + 2 T for each token"
        values["flops"] = float((factor * n + 2 * t) * tokens)
    if stage.evaluation and steps and stage.select:
        points = math.ceil(steps / stage.select.every)
        cost = stage.evaluation.load("estimate")(stage.evaluation, inputs)
        values["unknown"] += [text for text in cost.unknown if text not in values["unknown"]]
        if cost.flops and tokens:
            values["flops"] += points * cost.flops
            values["formula"] += f"; {points} x {cost.requests:,} requests of select, 2 N for each token"
    if training.device != inputs.device:
        values["unknown"].append("time, and whether it fits: it runs on GPUs, and there is none here to compare with")
        values["room"] = 0
    elif tokens:
        values |= inputs.duration(values["flops"], stage.processes)
    cost = Estimate(**values | {"memory": attempt(values["unknown"], "memory", training.memory)})
    return cost if cost.fits is not False else cost.model_copy(update={"remedies": training.remedies()})


def _read_rows(stage: TrainingStage, inputs: EstimateInputs) -> Rows:
    """Count all training rows and tokenise the first, as training does. Raises UserError."""
    tokenizer = AutoTokenizer.from_pretrained(inputs.paths["model"], trust_remote_code=stage.trust_remote_code)
    preparer = Preparer(tokenizer, stage.train_options["max_length"], getattr(stage.data, "turns", "all"))
    rows = (row.columns() for _, row in stage.rows(inputs.paths["train"], "train"))
    sample = list(islice(rows, SAMPLE))
    sequences = []
    for row in sample:
        answers = [row.pop(name) for name in ("chosen", "rejected") if name in row]
        sequences += [row | {"completion": answer} for answer in answers] or [row]
    table = preparer.prepare(sequences, range(len(sequences)))
    lengths = table["input_ids"].combine_chunks().value_lengths().to_pylist()
    total = len(sample) + sum(1 for _ in rows)
    check_positions(inputs.paths["model"], stage.trust_remote_code, max(lengths))
    return Rows(total, sum(lengths) * total / len(sample), max(lengths))


class Training:
    """A training with its training rows, where they are known. Raises UserError for a model that cannot be built."""

    def __init__(self, stage: TrainingStage, inputs: EstimateInputs, rows: Rows | None) -> None:
        self.stage, self.inputs, self.rows = stage, inputs, rows
        self.options = stage.train_options
        self.batch = self.options["per_device_train_batch_size"]
        self.accumulation = self.options["gradient_accumulation_steps"]
        self.processes = stage.launch.num_processes if stage.launch else 1
        sharding = stage.launch.sharding if stage.launch else None
        self.device = "cuda" if sharding else inputs.device  # accelerate shards on GPUs only
        precomputes = self.options.get("precompute_ref_log_probs") and sharding != "use_fsdp"  # which keeps the model
        self.keeps_reference = stage.has_reference and stage.lora is None and not precomputes
        lora = None if stage.lora is None else stage.lora.model_dump_json()
        self.model = build(inputs.paths["model"], stage.published_dtype, stage.trust_remote_code, lora)
        self.size = model_size(self.model, stage.quantization.model_dump() if stage.quantization else None)
        self.base_bytes = self.size.base * self.model.dtype.itemsize

    def steps_and_tokens(self) -> tuple[int | None, int | None]:
        """Return optimiser steps and tokens of all devices."""
        limit, epochs = self.options["max_steps"], self.options["num_train_epochs"]
        if self.rows is None:
            return limit if limit > 0 else None, None
        packed = self.options["packing"] and math.ceil(self.rows.tokens / self.options["max_length"])  # completely full
        total = packed or self.rows.total
        if limit > 0:
            seen = limit * self.batch * self.processes * self.accumulation / total
            epochs = min(seen, math.ceil(limit / steps_per_epoch(self.stage, total)))
        return optimiser_steps(self.stage, total), round(epochs * self.rows.tokens)

    def memory(self) -> Memory | None:
        """Return the bytes on each device, None if rows have no known or maximal length."""
        longest = self.rows.longest if self.rows and not self.options["packing"] else self.options["max_length"]
        if longest is None:
            return None
        size, split, on_cpu = self.size, shards(self.stage.launch), self.device == "cpu"
        activations, logits = self._forward(longest)
        if self.accumulation == 1:  # gradients come as activations go
            activations = max(0, activations - size.trainable_bytes)
        mapped = self.base_bytes if on_cpu and self.stage.quantization else 0  # pages of the file stay in memory
        memory = Memory(
            weights=size.weights * (2 if self.keeps_reference else 1) // split[0] + mapped,
            gradients=size.trainable_bytes // split[1],
            optimiser=optimiser_bytes(self.options["optim"], size) // split[2],
            activations=activations,
            logits=logits,
            libraries=TRAINING_PROCESS if on_cpu else 0,
        )
        reads_file = on_cpu and self.stage.reads_weights
        loading = TRAINING_PROCESS + 2 * self.base_bytes if reads_file else 0  # the file and the model
        return memory.model_copy(update={"loading": max(0, loading - memory.total)})

    def _forward(self, longest: int) -> tuple[int, int]:
        """Return the bytes of the backbone and of the head when the backward pass starts."""
        text, on_cpu, rows = self.model.config.get_text_config(), self.device == "cpu", self.batch
        if self.rows and not self.options["packing"]:
            rows = min(rows, math.ceil(self.rows.total / self.processes))
        rows *= 2 if self.stage.has_reference else 1  # pairs
        saved: float = saved_activations(self.model, rows, longest)
        if self.options["gradient_checkpointing"]:  # the input of each layer, and one layer's activations
            layers, bytes_per_token = text.num_hidden_layers, text.hidden_size * self.model.dtype.itemsize
            saved = saved / layers + layers * rows * longest * bytes_per_token
        if (not on_cpu and not self.options["fp16"]) if self.options["bf16"] is None else self.options["bf16"]:
            saved = AUTOCAST * saved + 2 * self.size.multiplied  # with the weights in bfloat16
        head, positions = self.model.get_output_embeddings().weight, rows * (longest - 1)
        logits = min(LOGITS_CHUNK, positions * text.vocab_size * 4)
        if self.stage.has_reference or not on_cpu:
            logits = TILE_COPIES[self.device] * min(positions, TILE[0]) * min(text.vocab_size, TILE[1]) * 4
        return round(saved * (ALLOCATOR if on_cpu else 1)), logits + (4 * head.numel() if head.requires_grad else 0)

    def remedies(self) -> list[Remedy]:
        """Return the mildest changes with which it fits, of those that keep the result."""
        train = {"activation_checkpointing": True, "per_device_train_batch_size": 1}
        train["gradient_accumulation_steps"] = self.accumulation * self.batch
        for count in (1, 3):
            changes = dict(islice(train.items(), count))
            options = self.stage.train.model_copy(update=changes)
            stage = self.stage.model_copy(update={"train": options})
            memory = Training(stage, self.inputs, self.rows).memory()
            if memory and memory.total <= self.inputs.room:
                lines = [f"train.{name}: {json.dumps(value)}" for name, value in changes.items()]
                return [Remedy(changes=lines, memory=memory.total, same_result=True)]
        return []
