"""Run a `dpo` stage: preference pairs -> TRL's DPOTrainer -> a published model.

The reference is the model that training starts from. No `ref_model` is passed, so TRL chooses it: without LoRA, it
loads the same folder a second time (or, with `precompute_ref_log_probs`, uses the model before training); with LoRA, it
switches the new adapter off. The adapter of an earlier SFT stage is merged into its published model, so after SFT the
reference is the SFT model, not the recipe's base model.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from stages.base import Context
from stages.data.reader import DROPPED_ROWS, dropped_note, dropped_rows_text
from stages.dpo.config import DPOStage
from stages.records.metrics import Metrics
from stages.training.loop import arguments, train
from stages.training.model_card import write_card
from stages.training.model_io import load_model, lora_config
from stages.training.tokenizer import load_tokenizer
from stages.training.trackers import TrackedFields


@dataclass
class Arguments(TrackedFields, DPOConfig):
    """DPOConfig with further fields for trackers."""


def run(context: Context) -> Metrics:
    """Train context.inputs["model"] on the `train` pairs; measure the loss on `eval` if there is one."""
    stage: DPOStage = context.config
    model_path = context.inputs["model"].path
    fields = stage.train.model_dump()
    context.progress(0, 1, "preparing pairs")
    splits = [name for name in ("train", "eval") if name in context.inputs]
    dropped: dict[str, list[str]] = {name: [] for name in splits}
    pairs = {name: [pair for _, pair in stage.rows(context.inputs[name].path, name, dropped[name])] for name in splits}
    datasets = {name: Dataset.from_list([pair.columns() for pair in pairs[name]]) for name in splits}
    trainer = DPOTrainer(
        model=load_model(
            model_path,
            stage.seed,
            fields.get("model_init_kwargs"),  # stays in the fields: TRL loads the reference with it
            quantization=stage.quantization,
            trust_remote_code=stage.trust_remote_code,
        ),
        args=Arguments(**arguments(context, fields), trust_remote_code=stage.trust_remote_code),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=load_tokenizer(model_path, pairs["train"], stage.trust_remote_code),
        peft_config=lora_config(stage.lora),
    )
    metrics = train(trainer, context)
    if dropped_rows := "".join(dropped_rows_text(dropped[name], [context.inputs[name].path]) for name in splits):
        (context.out / DROPPED_ROWS).write_text(dropped_rows, encoding="utf-8")
    last_log = next((row for row in reversed(trainer.state.log_history) if "rewards/margins" in row), {})
    metrics = metrics.extended(
        data={name: {"rows": len(pairs[name]), "rows_bad": len(dropped[name])} for name in splits},
        reward_margin=last_log.get("rewards/margins"),
        reward_accuracy=last_log.get("rewards/accuracies"),
        notes=metrics.notes + [dropped_note(name, len(dropped[name])) for name in splits if dropped[name]],
    )
    write_card(context, metrics)
    return metrics
