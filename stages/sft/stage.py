"""Runs an `sft` stage: rows -> WITTrainer -> a published model."""

from dataclasses import dataclass

import datasets

from stages.base import Context
from stages.data.dataset_cache import PreparedRows, load_rows
from stages.data.segments import describe_shares
from stages.data.tokenization import Preparer
from stages.models.tokenizer import load_step_tokenizer
from stages.records.metrics import Metrics
from stages.sft.config import SFTStage
from stages.sft.row_filter import describe_rows
from stages.sft.trainer import WITConfig, WITTrainer
from stages.training.loop import arguments, train
from stages.training.model_io import load_model, lora_config
from stages.training.trackers import TrackedFields, tracked_fields


@dataclass
class Arguments(TrackedFields, WITConfig):
    """WITConfig with the fields that trackers show in addition."""


def run(context: Context) -> Metrics:
    """Train context.inputs["model"] on `train` with the stage's weights; evaluate on `eval` if there is one."""
    datasets.disable_caching()  # packed rows serve one pair of weights; load_rows caches the rest
    stage: SFTStage = context.config
    base = context.inputs["model"].path
    fields = stage.train.model_dump()
    options = fields.pop("model_init_kwargs", None)
    args = Arguments(
        **tracked_fields(context) | arguments(context, fields),
        prompt_loss_weight=stage.weights.prompt,
        completion_loss_weight=stage.weights.completion,
        system_loss_weight=stage.weights.system,
        template_loss_weight=stage.weights.template,
        turns=stage.data.turns,
    )
    context.progress(0, 1, "preparing rows")
    tokenizer = load_step_tokenizer(context)
    preparer = Preparer(tokenizer, args.max_length, stage.data.turns)
    data = {name: load_rows(context, name, preparer) for name in ("train", "eval") if name in context.inputs}
    context.progress(0, 1, "loading the model")
    trainer = WITTrainer(
        model=load_model(base, stage.seed, options, stage.random_init, stage.quantization, stage.trust_remote_code),
        args=args,
        train_dataset=data["train"][0],
        eval_dataset=data["eval"][0] if "eval" in data else None,
        processing_class=tokenizer,
        peft_config=lora_config(stage.lora),
    )
    splits: dict[str, PreparedRows] = {}
    for name, (rows, report) in data.items():
        splits[name] = describe_rows(rows, report, trainer.used[name], tokenizer)
        if len(splits[name].stats.weighted) > 1:
            splits[name].notes.append(describe_shares(splits[name].stats.weighted_share))
    sums = {"tally": trainer.train_metrics.sums}  # its name in checkpoints
    return train(trainer, context, splits, sums, {})
