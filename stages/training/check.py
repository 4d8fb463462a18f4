"""Check a training before it runs: options on this machine, tokenizer, model and every row, without any weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stages.base import Context, Findings, UserError
from stages.models.model_folder import why_not_loaded
from stages.models.model_size import ModelSize, build, check_positions, checkpoint_bytes, model_size
from stages.training.config import DEFAULT_EPOCHS, LoraOptions, PreparedRows, TrainingStage, check_token_id
from stages.training.launch import require_sharding
from stages.training.tokenizer import load_tokenizer

HIGH_LEARNING_RATE = 1e-2

CHECKED_BY_RECIPE = frozenset({
    "activation_checkpointing", "activation_checkpointing_kwargs", "beta", "dataset_num_proc", "eval_packing",
    "eval_steps", "eval_strategy", "gradient_accumulation_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "learning_rate", "logging_steps", "lr_scheduler_type", "max_grad_norm",
    "max_length", "max_steps", "model_init_kwargs", "num_train_epochs", "packing", "padding_free",
    "per_device_eval_batch_size", "per_device_train_batch_size", "save_steps", "warmup_steps", "weight_decay",
})  # fmt: skip
"""Options of `train` that work on every machine. Only others need TRL's own checks, which take seconds to import."""


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    stage: TrainingStage = context.config
    path, findings = context.inputs["model"].path, Findings()
    model = path, stage.published_dtype, stage.trust_remote_code
    if on_this_machine:
        with findings.part("options on this machine"):
            _check_options(context)
        if stage.quantization is not None:
            with findings.part("quantisation"):
                from stages.training.model_io import check_quantization

                check_quantization(stage.quantization)
        if stage.model_init.get("attn_implementation"):
            with findings.part("attention kernel", "train.model_init_kwargs"):
                from stages.training.model_io import load_model

                with torch.device("meta"):
                    load_model(path, stage.seed, stage.model_init, True, trust_remote_code=stage.trust_remote_code)
    with findings.part("model", "model"):
        size, vocabulary = _size(*model, None)
        findings.published = size.weights
        if stage.lora is not None:
            with findings.part("LoRA", "lora"):
                size, _ = _size(*model, stage.lora.model_dump_json())
                findings.published += size.trainable_bytes
        findings.checkpoints = checkpoint_bytes(str(stage.train_options["optim"]), size)
        if stage.packs:
            with findings.part("packing", "train"):
                stage.check_packing(path)
        rows = _prepare_rows(context, findings, vocabulary)
        if rows:
            longest = max(prepared.longest for prepared in rows.values())
            with findings.part(f"positions for {longest:,} tokens"):
                if note := check_positions(path, stage.trust_remote_code, longest):
                    findings.notes.append(("train.max_length", note))
        findings.notes += _slips(context, rows.get("train"))
        cores = os.cpu_count() or 1
        if on_this_machine and stage.processes > cores and not torch.cuda.is_available():
            findings.notes.append(("launch.num_processes", f"{stage.processes} processes share {cores} cores"))
    return findings


@cache
def _size(path: Path, dtype: str, trusted: bool, lora: str | None) -> tuple[ModelSize, int]:
    """The size of a model with its adapter, and its number of token ids."""
    model = build(path, dtype, trusted, LoraOptions.model_validate_json(lora) if lora else None)
    return model_size(model), model.get_input_embeddings().num_embeddings


_PREPARED: dict[Any, dict[str, PreparedRows]] = {}
"""What decides the rows of a stage -> its rows: the cells of a matrix share them."""


def _prepare_rows(context: Context, findings: Findings, vocabulary: int) -> dict[str, PreparedRows]:
    """Prepare the rows of each split that can be used, in the cache that training reads."""
    stage: TrainingStage = context.config
    paths = {name: source.path for name, source in context.inputs.items()}
    key = stage.kind, *paths.items(), stage.data.model_dump_json(), stage.row_settings
    if key in _PREPARED:
        return _PREPARED[key]
    rows: dict[str, PreparedRows] = {}
    splits = [split for split in ("train", "eval") if split in paths]
    with findings.part("tokenizer", "model"):
        first_rows = [next(stage.rows(paths[split], split))[1] for split in splits]
        tokenizer = load_tokenizer(paths["model"], first_rows, stage.trust_remote_code)
        for split in splits:
            with findings.part(f"{split} rows"):
                rows[split] = stage.prepare_rows(context, split, tokenizer)
                check_token_id(split, rows[split].largest_id, vocabulary)
    if not findings.problems:
        _PREPARED[key] = rows
    return rows


def _check_options(context: Context) -> None:
    """Check that the options of `launch` and `train` work on this machine. Raises UserError."""
    stage: TrainingStage = context.config
    if stage.launch is not None:
        require_sharding(stage.launch)
    fields = stage.train.model_dump()
    if not fields.keys() - CHECKED_BY_RECIPE:
        return
    import trl
    from transformers import Trainer

    from stages.training.loop import arguments

    try:
        config = getattr(trl, stage.trl_config)(**arguments(context, fields, with_trackers=False))
        if config.fp16 and config.device.type == "cpu":
            raise UserError("fp16 training needs a GPU, and there is none here; leave it out", "train.fp16")
        if "optim" in fields:
            Trainer.get_optimizer_cls_and_kwargs(config, None)
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        text = why_not_loaded(error)
        names = [name for name in fields if name in text] or [name for name in fields if name.split("_")[0] in text]
        raise UserError(text, ".".join(["train", *names[:1]])) from None


def _slips(context: Context, rows: PreparedRows | None) -> Iterator[tuple[str, str]]:
    """Yield key and text of settings that are allowed but seldom meant. docs/stages.md has the table."""
    stage: TrainingStage = context.config
    options = stage.train_options
    yield from stage.weight_slips()
    if (rate := options["learning_rate"]) > HIGH_LEARNING_RATE:
        yield "train.learning_rate", f"{rate:g} is very high; most trainings diverge above {HIGH_LEARNING_RATE:g}"
    train, evaluation = context.inputs["train"], context.inputs.get("eval")
    same_split = stage.data.train_split == stage.data.eval_split or not train.path.is_dir()
    if evaluation is not None and evaluation.fingerprint == train.fingerprint and same_split:
        yield "data.eval", "has the same content as data.train, so its loss says nothing about new data"
    if rows is not None and not options.get("packing"):
        steps = _steps(options, rows.used, stage.launch.num_processes if stage.launch else 1)
        if (options["warmup_steps"] or 0) >= max(steps, 2):
            yield "train.warmup_steps", f"the training has {steps} steps, so it never reaches its learning rate"


def _steps(options: dict[str, Any], rows: int, processes: int) -> int:
    """Optimiser steps, as transformers' Trainer counts them."""
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    batches = math.ceil(rows / (options["per_device_train_batch_size"] * processes))
    per_epoch = max(1, math.ceil(batches / options["gradient_accumulation_steps"]))
    return math.ceil(per_epoch * (options["num_train_epochs"] or DEFAULT_EPOCHS))
