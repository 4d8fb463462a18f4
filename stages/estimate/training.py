"""What an sft or dpo stage takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from stages.base import UserError
from stages.dpo.config import DPOStage
from stages.estimate.optimisers import optimiser_bytes
from stages.estimate.remedies import remedies
from stages.estimate.result import Disk, Estimate, Given, Memory
from stages.estimate.rows import SAMPLE, Lengths, lengths
from stages.estimate.sharding import Shards, shards
from stages.estimate.sizes import Sizes, build, dtype_of, read_config, sizes
from stages.estimate.speed import NO_ROOM, measured
from stages.estimate.trace import Pass
from stages.training.checkpoints import CHECKPOINTS_KEPT
from stages.training.config import TrainingStage


def estimate(stage: TrainingStage, given: Given) -> Estimate:
    """All that can be known of the stage from what is here. Raises UserError for what is wrong, not for what lacks."""
    found = Estimate(room=given.room, room_of=given.room_of)
    rows = _rows(stage, given, found)
    if "model" not in given.paths:
        found.unknown.append(f"parameters, memory, disk, FLOPs and time: {given.missing['model']}")
        _work(stage, rows, found)
        return found
    training = Training(stage, given, read_config(given.paths["model"], stage.trust_remote_code))
    if training.device != given.device:
        found.room = 0
        found.unknown.append("whether it fits: it runs on GPUs, and there is none here to compare with")
    found.parameters, found.trainable = training.sizes.base, training.sizes.trainable
    found.disk = training.disk()
    _work(stage, rows, found)
    longest = rows["train"].longest if "train" in rows else training.max_length
    if longest is None:
        found.unknown.append("memory: max_length is not set, and the rows are not here to tell how long they are")
        return found
    if "train" not in rows:
        found.notes.append(f"memory is for rows of {longest} tokens, the longest that max_length lets through")
    try:
        found.memory = training.memory(longest, rows["train"].rows if "train" in rows else None)
    except Exception as error:  # a model's own forward pass may do whatever it likes
        found.unknown.append(f"memory: the model's forward pass cannot be traced without weights: {_line(error)}")
    if found.fits is False:
        found.remedies = remedies(stage, given, longest, rows["train"].rows if "train" in rows else None)
    _time(training, rows, found)
    return found


@dataclass(frozen=True)
class Training:
    """One training stage on one kind of device."""

    stage: TrainingStage
    given: Given
    config: Any

    @cached_property
    def options(self) -> dict[str, Any]:
        """The recipe's fields over TRL's defaults."""
        kind = DPOConfig if self.is_dpo else SFTConfig
        fields: dict[str, Any] = {name: field.default for name, field in kind.__dataclass_fields__.items()}
        fields |= self.stage.train.model_dump()
        if (wins := fields["activation_checkpointing"]) is not None:  # which transformers 5 calls it
            fields["gradient_checkpointing"] = wins
        return fields

    @property
    def is_dpo(self) -> bool:
        """Whether rows are pairs."""
        return isinstance(self.stage, DPOStage)

    @property
    def keeps_reference(self) -> bool:
        """Whether DPO's reference is there while it trains: TRL lets go of it where all was computed before, but
        under FSDP."""
        sharding = self.stage.launch.sharding if self.stage.launch else None
        return self.is_dpo and (not self.options["precompute_ref_log_probs"] or sharding == "use_fsdp")

    @property
    def device(self) -> str:
        """Where it runs; what splits a model runs on GPUs alone, wherever it is estimated."""
        return "cuda" if self.stage.launch and self.stage.launch.sharding else self.given.device

    @property
    def max_length(self) -> int | None:
        """The longest row in tokens."""
        return self.options["max_length"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return dtype_of(self.options["model_init_kwargs"], self.config)

    @property
    def bfloat16(self) -> bool:
        """Whether the pass runs under autocast, as stages.training has it on GPUs."""
        asked = self.stage.train.model_dump().get("bf16")
        return bool(self.device == "cuda" and not self.options["fp16"] if asked is None else asked)

    @cached_property
    def sizes(self) -> Sizes:
        """Of the model that trains."""
        quantization = self.stage.quantization.model_dump() if self.stage.quantization else None
        return sizes(self.config, self.dtype, self.stage.lora, quantization, self.stage.trust_remote_code)

    @property
    def shards(self) -> Shards:
        """How it is split between processes."""
        return shards(self.stage.launch)

    def memory(self, longest: int, rows: int | None, by_part: bool = True) -> Memory:
        """Of each device, where the longest row has so many tokens, and there are so many rows; without `by_part` the
        logits are among the activations, which takes half the time to find."""
        sized, split = self.sizes, self.shards
        copies = 2 if self.keeps_reference and self.stage.lora is None else 1
        whole = self._pass(longest, rows)
        most = whole.peaks(self.config).most
        beyond = max(0, most - sized.trainable_bytes) + (2 * sized.layer if split.weights > 1 else 0)
        without = whole.without_head().peaks(self.config).most if by_part else most
        logits = min(beyond, max(0, most - max(without, sized.trainable_bytes)))
        found = Memory(
            weights=round(sized.weights * copies / split.weights) + self._mapped(),
            gradients=round(sized.trainable_bytes / split.gradients),
            optimiser=round(optimiser_bytes(str(self.options["optim"]), sized) / split.optimiser),
            activations=beyond - logits,
            logits=logits,
            libraries=self.given.libraries if self.device == "cpu" else 0,
        )
        return found.model_copy(update={"loading": max(0, self._loading() - found.total)})

    def _pass(self, longest: int, rows: int | None) -> Pass:
        """What a micro-batch of the longest rows takes."""
        options, launch = self.options, self.stage.launch
        attention = (options["model_init_kwargs"] or {}).get("attn_implementation")
        make = partial(
            build,
            dtype=self.dtype,
            lora=self.stage.lora,
            checkpointing=bool(options["gradient_checkpointing"]),
            attention=attention if attention in ("eager", "sdpa") else None,
            trusted=self.stage.trust_remote_code,
        )
        packed = bool(options.get("packing"))
        batch = options["per_device_train_batch_size"]
        if rows and not packed:
            batch = min(batch, math.ceil(rows / (launch.num_processes if launch else 1)))
        return Pass(
            make,
            rows=batch * (2 if self.is_dpo else 1),
            length=self.max_length if packed and self.max_length else longest,
            head="trl" if self.is_dpo or self.device == "cuda" else "wit",
            reference=self.keeps_reference,
            accumulates=options["gradient_accumulation_steps"] > 1,
            bfloat16=self.bfloat16,
        )

    def _mapped(self) -> int:
        """Pages of the file that stay resident on a CPU: they are the weights themselves, unless those are quantised,
        which then lie beside them."""
        quantised = self.device == "cpu" and self.stage.quantization is not None
        return self.sizes.base * self.dtype.itemsize if quantised else 0

    def _loading(self) -> int:
        """What this process holds while weights are read: those of the file beside those in memory."""
        if self.device != "cpu" or not self.stage.reads_weights:
            return 0
        return self.given.libraries + 2 * self.sizes.base * self.dtype.itemsize

    def disk(self) -> Disk:
        """The published model, and the checkpoints of the training: one more than are kept, while it is written."""
        sized = self.sizes
        adapter = 0 if self.stage.lora is None else sized.trainable_bytes
        state = sized.trainable_bytes + optimiser_bytes(str(self.options["optim"]), sized)
        published = sized.base * self.dtype.itemsize + adapter
        return Disk(published=published, checkpoints=(CHECKPOINTS_KEPT + 1) * state)

    @property
    def per_token(self) -> tuple[float, str]:
        """FLOPs for each token, and how they were counted. A frozen weight needs no gradient of its own."""
        n, t = self.sizes.multiplied, min(self.sizes.trainable, self.sizes.multiplied)
        again = bool(self.options["gradient_checkpointing"])
        count, told = 4 * n + 2 * t, "6 N" if t == n else "4 N + 2 T"
        if again:
            count, told = count + 2 * n, "8 N" if t == n else "6 N + 2 T"
        if self.is_dpo:
            count, told = count + 2 * n, f"{told} + 2 N of the reference"
        return count, f"{told} for each token" + (", with gradient checkpointing" if again else "")


def _rows(stage: TrainingStage, given: Given, found: Estimate) -> dict[str, Lengths]:
    """The lengths of what is here; what is not is noted."""
    if lacking := [f"{part}: {given.missing[part]}" for part in ("train", "eval") if part in given.missing]:
        found.unknown.append(f"tokens: {'; '.join(lacking)}")
    if "model" in given.missing:
        found.unknown.append("tokens: the tokenizer is the model's, which is not here")
        return {}
    kind = DPOConfig if isinstance(stage, DPOStage) else SFTConfig
    max_length = stage.train.model_dump().get("max_length", kind.max_length)
    parts: list[str] = [part for part in ("train", "eval") if part in given.paths]
    try:
        rows: dict[str, Lengths] = {
            part: lengths(stage, given.paths[part], part, given.paths["model"], max_length) for part in parts
        }
    except UserError as error:
        if error.key:
            raise
        found.unknown.append(f"tokens: {_line(error)}")
        return {}
    found.notes += [
        f"{part} data: the first {each.sampled:,} of {each.rows:,} rows were tokenised and stand for all"
        for part, each in rows.items()
        if each.rows > SAMPLE
    ]
    return rows


def _work(stage: TrainingStage, rows: dict[str, Lengths], found: Estimate) -> None:
    """Steps and tokens, as transformers' Trainer counts them."""
    options = stage.train.model_dump()
    most = options.get("max_steps", -1)
    if most > 0:
        found.optimiser_steps = most
    if "train" not in rows:
        return
    read, processes = rows["train"], stage.launch.num_processes if stage.launch else 1
    batch, accumulation = options.get("per_device_train_batch_size", 8), options.get("gradient_accumulation_steps", 1)
    count, mean = float(read.rows), read.mean
    if options.get("packing"):
        length: Any = options.get("max_length", SFTConfig.max_length)
        whole = count * mean
        count = math.ceil(whole / length)
        mean = whole / count
        found.notes.append("packed rows are counted as if none had room left")
    batches = math.ceil(count / (batch * processes))
    per_epoch = max(1, math.ceil(batches / accumulation))
    epochs = options.get("num_train_epochs", 3.0)
    found.optimiser_steps = most if most > 0 else math.ceil(per_epoch * epochs)
    seen = min(most * batch * processes * accumulation, count * math.ceil(most / per_epoch)) if most > 0 else 0
    found.tokens = round((seen or count * epochs) * mean)


def _time(training: Training, rows: dict[str, Lengths], found: Estimate) -> None:
    """FLOPs and seconds."""
    if found.tokens is None:
        return
    per_token, formula = training.per_token
    evaluated = rows["eval"].rows * rows["eval"].mean * _evaluations(training, found) if "eval" in rows else 0
    found.flops = per_token * found.tokens + 2 * training.sizes.multiplied * evaluated
    found.formula = formula + ("; 2 N for each of the evaluation data's" if evaluated else "")
    stage, given = training.stage, training.given
    batch = training.options["per_device_train_batch_size"]
    if given.finished and given.finished.tokens:
        found.seconds = found.tokens * given.finished.seconds / given.finished.tokens
        found.speed = f"tokens per second of {given.finished.step}, which this folder of runs has"
        return
    if training.device != given.device:
        found.unknown.append("time: it needs GPUs, and there is none here to measure")
        return
    packed = bool(training.options.get("packing"))
    speed = measured(
        training.config, given.device, given.threads, rows["train"].longest, True, training.bfloat16, given.room
    )
    if speed is None:
        found.unknown.append(NO_ROOM)
        return
    found.seconds = found.flops * (1 if packed else rows["train"].padding(batch)) / speed / stage.processes
    found.speed = f"{speed / 1e9:.1f} GFLOP/s, measured on a few layers of the model just now"


def _evaluations(training: Training, found: Estimate) -> int:
    """How often the evaluation data are read: as transformers' Trainer does, and once at the end."""
    options, steps = training.options, found.optimiser_steps or 0
    strategy = str(options["eval_strategy"])
    if strategy == "epoch":
        return math.ceil(options["num_train_epochs"]) + 1
    every = options["eval_steps"] or options["logging_steps"]
    if strategy == "steps":
        return int(steps // every if every >= 1 else 1 / every) + 1
    return 1


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
