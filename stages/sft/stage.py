"""Runs an `sft` stage: rows -> WITTrainer -> a published model."""

from __future__ import annotations

from typing import Any

from stages.base import Context
from stages.sft.config import SFTStage
from stages.sft.trainer import WITConfig, WITTrainer
from stages.training import arguments, dataset, load_model, load_tokenizer, lora_config, train


def run(context: Context) -> dict[str, Any]:
    """Train context.inputs["model"] on `train` with the stage's weights; measure the loss on `eval` if given."""
    stage: SFTStage = context.config
    base = context.inputs["model"].path
    fields = stage.train.model_dump()
    model = load_model(base, stage.seed, fields.pop("model_init_kwargs", None), stage.random_init)
    args = WITConfig(
        **arguments(context, fields),
        prompt_loss_weight=stage.weights.prompt,
        completion_loss_weight=stage.weights.completion,
    )
    rows = stage.rows({name: given.path for name, given in context.inputs.items()})
    data = {name: dataset(part) for name, part in rows.items()}
    trainer = WITTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=load_tokenizer(base, rows["train"]),
        peft_config=lora_config(stage.lora),
    )
    return train(trainer, context) | {"rows": len(rows["train"]), "rows_used": len(trainer.train_dataset)}  # type: ignore[arg-type]
