"""Runs a `dpo` stage: preference rows -> TRL's DPOTrainer -> a published model.

The reference is the model that training starts from: without LoRA, TRL loads it a second time from the same folder;
with LoRA, it is the model with the new adapter switched off. An SFT adapter was merged before, so neither is ever the
bare base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import stages.training.quick_peft  # noqa: F401

# isort: split
from trl import DPOConfig, DPOTrainer

from stages.base import Context
from stages.data.reader import DROPPED_ROWS, dropped_note, dropped_rows_text
from stages.dpo.config import DPOStage
from stages.records.metrics import Metrics
from stages.training.loop import arguments, dataset, load_model, load_tokenizer, lora_config, train
from stages.training.model_card import write_card
from stages.training.trackers import Told


@dataclass
class Arguments(Told, DPOConfig):
    """DPOConfig with what trackers are told besides."""


def run(context: Context) -> Metrics:
    """Train context.inputs["model"] on the pairs in `train`; measure the loss on `eval` if given."""
    stage: DPOStage = context.config
    base = context.inputs["model"].path
    fields = stage.train.model_dump()
    context.progress(0, 1, "preparing pairs")
    parts = [name for name in ("train", "eval") if name in context.inputs]
    dropped: dict[str, list[str]] = {name: [] for name in parts}
    rows = {name: [row for _, row in stage.rows(context.inputs[name].path, name, dropped[name])] for name in parts}
    data = {name: dataset(part) for name, part in rows.items()}
    trainer = DPOTrainer(
        model=load_model(
            base,
            stage.seed,
            fields.get("model_init_kwargs"),
            quantization=stage.quantization,
            trust_remote_code=stage.trust_remote_code,
        ),
        args=Arguments(**arguments(context, fields), trust_remote_code=stage.trust_remote_code),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=load_tokenizer(base, rows["train"], stage.trust_remote_code),
        peft_config=lora_config(stage.lora),
    )
    metrics = train(trainer, context)
    if listed := "".join(dropped_rows_text(dropped[name], [context.inputs[name].path]) for name in parts):
        (context.out / DROPPED_ROWS).write_text(listed, encoding="utf-8")
    last = next((row for row in reversed(trainer.state.log_history) if "rewards/margins" in row), {})
    metrics = metrics.extended(
        data={name: {"rows": len(rows[name]), "rows_bad": len(dropped[name])} for name in parts},
        reward_margin=last.get("rewards/margins"),
        reward_accuracy=last.get("rewards/accuracies"),
        notes=metrics.notes + [dropped_note(name, len(dropped[name])) for name in parts if dropped[name]],
    )
    write_card(context, metrics)
    return metrics
