"""Runs an `sft` stage: rows -> WITTrainer -> a published model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import datasets

from stages.base import Context
from stages.data.reader import DROPPED_ROWS, dropped_note
from stages.records.metrics import Metrics
from stages.sft.config import SFTStage
from stages.sft.dataset_cache import prepared
from stages.sft.row_filter import Used
from stages.sft.trainer import WITConfig, WITTrainer
from stages.training.loop import arguments, train
from stages.training.model_card import write_card
from stages.training.model_io import load_model, load_tokenizer, lora_config
from stages.training.trackers import TrackedFields


@dataclass
class Arguments(TrackedFields, WITConfig):
    """WITConfig with what trackers are told besides."""


def run(context: Context) -> Metrics:
    """Train context.inputs["model"] on `train` with the stage's weights; measure the loss on `eval` if given."""
    datasets.disable_caching()  # of rows packed for one pair of weights; what all pairs share is kept by prepared()
    stage: SFTStage = context.config
    base = context.inputs["model"].path
    fields = stage.train.model_dump()
    options = fields.pop("model_init_kwargs", None)
    args = Arguments(
        **arguments(context, fields),
        prompt_loss_weight=stage.weights.prompt,
        completion_loss_weight=stage.weights.completion,
        system_loss_weight=stage.weights.system,
        template_loss_weight=stage.weights.template,
        turns=stage.data.turns,
    )
    context.progress(0, 1, "preparing rows")
    parts = [name for name in ("train", "eval") if name in context.inputs]
    first = {name: next(stage.rows(context.inputs[name].path, name))[1] for name in parts}
    tokenizer = load_tokenizer(base, list(first.values()), stage.trust_remote_code)
    data = {name: prepared(context, name, tokenizer, args.max_length) for name in parts}
    context.progress(0, 1, "loading the model")
    trainer = WITTrainer(
        model=load_model(base, stage.seed, options, stage.random_init, stage.quantization, stage.trust_remote_code),
        args=args,
        train_dataset=data["train"][0],
        eval_dataset=data["eval"][0] if "eval" in data else None,
        processing_class=tokenizer,
        peft_config=lora_config(stage.lora),
    )
    metrics = train(trainer, context, {"tally": trainer.train_sums})
    if dropped := [line for _, lines in data.values() for line in lines]:
        (context.out / DROPPED_ROWS).write_text("".join(f"{line}\n" for line in dropped), encoding="utf-8")
    used = trainer.used
    metrics = metrics.extended(
        data={name: _counts(used[name], len(data[name][1])) for name in parts},
        notes=metrics.notes + [note for name in parts for note in _notes(name, used[name], len(data[name][1]))],
    )
    write_card(context, metrics)
    return metrics


def _counts(used: Used, dropped: int) -> dict[str, Any]:
    """What became of all rows of a file, with those that were dropped as they were read."""
    return asdict(used) | {"rows": used.rows - used.rows_bad + dropped, "rows_bad": dropped}


def _notes(part: str, used: Used, dropped: int) -> list[str]:
    """What a user would want to know of the rows, in words."""
    told = {
        "rows have no token that weighs and were left out": used.rows_without_weight,
        "rows lost their whole completion at max_length; raise train.max_length": used.rows_without_completion,
        "tokens lie beyond max_length and were cut off": used.tokens_truncated,
        "tokens reach over the boundary between prompt and completion": used.tokens_merged,
    }
    notes = [f"{part} data: {count} {what}" for what, count in told.items() if count]
    return [dropped_note(part, dropped), *notes] if dropped else notes
