"""Check a training before it runs: options on this machine, tokenizer, model and every row, without any weights."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings, UserError
from stages.data.dataset_cache import PreparedRows
from stages.library_options.option_models import RULES
from stages.models.generation_config import NOT_PUBLISHED, describe, read_generation_config, unpublishable
from stages.models.model_folder import why_not_loaded
from stages.models.model_size import build, check_positions, checkpoint_bytes, model_size
from stages.models.tokenizer import load_step_tokenizer, load_stop_ids
from stages.training.config import TrainingStage, select_key
from stages.training.estimate import optimiser_steps
from stages.training.launch import require_sharding

HIGH_LEARNING_RATE = 1e-2

PROCESS_COUNTS = ("dataset_num_proc", "dataloader_num_workers")
PROCESSES_PER_CORE = 16
"""More on a machine without a GPU, or more workers, spend its memory and are never faster."""


PrepareRows = Callable[[Context, str, PreTrainedTokenizerBase, set[int]], PreparedRows]
"""Prepares a split with a tokenizer, and the ids of tokens that stop generation, as training does, in the cache. Raises
UserError for rows that cannot be used."""
_PREPARED: dict[Any, dict[str, PreparedRows]] = {}
"""What decides the rows of a stage -> their counts and notes: the cells of a matrix share them."""


def check_training(context: Context, on_this_machine: bool, prepare_rows: PrepareRows, row_settings: Any) -> Findings:
    """Check a step; `row_settings`, besides `data` and `max_length`, decide the outcome of `prepare_rows`."""
    stage: TrainingStage = context.config
    path, findings = context.inputs["model"].path, Findings()
    model = path, stage.published_dtype, stage.trust_remote_code
    if on_this_machine:
        _check_machine(context, findings)
    with findings.part("model", "model"):
        built = build(*model)
        size, vocabulary = model_size(built), built.config.get_text_config().vocab_size
        findings.published = size.weights
        not_published = describe(NOT_PUBLISHED, unpublishable(read_generation_config(path)))
        findings.notes += [("model", note) for note in not_published]
        if stage.lora is not None:
            with findings.part("LoRA", "lora"):
                size = model_size(build(*model, stage.lora.model_dump_json()))
                findings.published += size.trainable_bytes
        findings.checkpoints = checkpoint_bytes(str(stage.train_options["optim"]), size)
        paths = {name: source.path for name, source in context.inputs.items()}
        key = repr((stage.kind, paths, stage.data, stage.train_options["max_length"], row_settings))
        rows = _PREPARED.get(key) or _prepare(context, findings, prepare_rows, vocabulary)
        if not findings.problems:
            _PREPARED[key] = rows
        findings.notes += [(f"data.{split}", note) for split, prepared in rows.items() for note in prepared.notes]
        if rows:
            longest = max(prepared.stats.longest for prepared in rows.values())
            with findings.part(f"positions for {longest:,} tokens"):
                if note := check_positions(path, stage.trust_remote_code, longest):
                    findings.notes.append(("train.max_length", note))
        findings.notes += _slips(context, rows.get("train"))
        if evaluation := stage.evaluation:
            scoring = evaluation.load("check")(replace(context, config=evaluation), on_this_machine)
            findings.passed, findings.tasks = findings.passed + scoring.passed, scoring.tasks
            findings.notes += [(select_key(key), text) for key, text in scoring.notes if not key.startswith("models")]
            findings.problems += [(key and select_key(key), text) for key, text in scoring.problems]
        if stage.select and "train" in rows and not stage.train_options.get("packing"):
            with findings.part("points of select"):
                stage.select.check_steps(optimiser_steps(stage, rows["train"].stats.rows_used))
    return findings


def check_token_id(split: str, largest_id: int, vocabulary: int) -> None:
    """Raise UserError if a token id of a split is not in the model's vocabulary."""
    if largest_id >= vocabulary:
        raise UserError(
            f"the {split} data contain the token id {largest_id}, but the model's ids are 0 to {vocabulary - 1};"
            " prepare the rows with the model's own tokenizer",
            f"data.{split}",
        )


def _prepare(
    context: Context, findings: Findings, prepare_rows: PrepareRows, vocabulary: int
) -> dict[str, PreparedRows]:
    """Prepare the splits that can be used."""
    rows: dict[str, PreparedRows] = {}
    with findings.part("tokenizer", "model"):
        tokenizer = load_step_tokenizer(context)
        for split in (split for split in ("train", "eval") if split in context.inputs):
            with findings.part(f"{split} rows"):
                stop_ids = load_stop_ids(context.inputs["model"].path, tokenizer, context.config.trust_remote_code)
                prepared = prepare_rows(context, split, tokenizer, stop_ids)
                rows[split] = prepared._replace(dataset=Dataset.from_dict({}), dropped=[])  # they grow with the data
                check_token_id(split, rows[split].stats.largest_id, vocabulary)
    return rows


def _check_machine(context: Context, findings: Findings) -> None:
    """Check what needs a GPU or a package."""
    stage: TrainingStage = context.config
    with findings.part("options on this machine"):
        _check_options(context)
    if stage.quantization is not None:
        with findings.part("quantisation"):
            from stages.training.model_io import check_quantization

            check_quantization(stage.quantization)
    if stage.model_init.get("attn_implementation"):
        with findings.part("attention kernel", "train.model_init_kwargs"):
            from stages.training.model_io import load_model

            path, trusted = context.inputs["model"].path, stage.trust_remote_code
            with torch.device("meta"):
                load_model(path, stage.seed, stage.model_init, True, trust_remote_code=trusted)
    cores = os.cpu_count() or 1
    ranks = stage.launch.processes_per_machine if stage.launch and not torch.cuda.is_available() else 1
    processes = {"launch.num_processes": ranks}
    processes |= {f"train.{name}": stage.train_options.get(name) or 1 for name in PROCESS_COUNTS}
    for key, count in processes.items():
        if count > (limit := PROCESSES_PER_CORE * cores):
            findings.problems.append((key, f"{count} processes are too many for {cores} cores; set at most {limit}"))
        elif key == "launch.num_processes" and count > cores:
            findings.notes.append((key, f"{count} processes share {cores} cores"))


def _check_options(context: Context) -> None:
    """Check that the options of `launch` and `train` work on this machine. Raises UserError."""
    stage: TrainingStage = context.config
    if stage.launch is not None:
        require_sharding(stage.launch)
    fields = stage.train.model_dump()
    if fields.keys() <= set(RULES["checked_by_recipe"]):
        return
    on_cpu = fields.get("use_cpu") or not torch.accelerator.is_available()
    for name in ("bf16", "fp16", "tf32"):  # with use_cpu, bf16 and tf32 work or are ignored
        if fields.get(name) and on_cpu and (name == "fp16" or not fields.get("use_cpu")):
            raise UserError(f"{name} training needs a GPU, and there is none here; leave it out", f"train.{name}")
    import trl
    from transformers import Trainer

    from stages.training.loop import arguments

    try:
        config = getattr(trl, stage.trl_config)(**arguments(context, fields))
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
    if (rate := options["learning_rate"]) > HIGH_LEARNING_RATE:
        yield "train.learning_rate", f"{rate:g} is very high; most trainings diverge above {HIGH_LEARNING_RATE:g}"
    train, evaluation = context.inputs["train"], context.inputs.get("eval")
    same_split = stage.data.train_split == stage.data.eval_split or not train.path.is_dir()
    if evaluation is not None and evaluation.fingerprint == train.fingerprint and same_split:
        yield "data.eval", "has the same content as data.train, so its loss says nothing about new data"
    if rows is not None and not options.get("packing"):
        steps = optimiser_steps(stage, rows.stats.rows_used)
        if (options["warmup_steps"] or 0) >= max(steps, 2):
            yield "train.warmup_steps", f"the training has {steps} steps, so it never reaches its learning rate"
