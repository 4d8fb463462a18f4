"""What every stage that trains a model shares: loading, LoRA, defaults fit for the machine, progress, publishing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl import DPOTrainer, SFTTrainer

from stages.base import BadInput, Context
from stages.options import Options


def load_tokenizer(path: Path, rows: list[Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. Raises BadInput where there is none, or one that cannot serve `rows` of stages.rows."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: holds no tokenizer that can be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"{path}: its tokenizer gives no character offsets; save it as a fast tokenizer")
    if tokenizer.eos_token is None:
        raise BadInput(f"{path}: its tokenizer has no EOS token, so no answer could end; set one")
    if tokenizer.chat_template is None and not isinstance(rows[0].prompt, str):
        raise BadInput(
            f"{path}: its tokenizer has no chat template, and the rows are messages; give rows of plain text, for"
            " example by 'format: official' for instruction data, or a model with a chat template"
        )
    return tokenizer


def load_model(path: Path, seed: int, options: dict[str, Any] | None, random_init: bool = False) -> PreTrainedModel:
    """The model in `path`, float32 unless `options` (TRL's `model_init_kwargs`) say otherwise; safetensors only."""
    set_seed(seed)
    options = {"dtype": torch.float32} | (options or {})
    try:
        if random_init:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **options)
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: holds no model that can be loaded: {_first_line(error)}") from None


def lora_config(lora: Options | None) -> LoraConfig | None:
    """PEFT's LoraConfig of a recipe's `lora` section."""
    return None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())


def arguments(context: Context, fields: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a TRL config: the recipe's fields over defaults that fit the machine and the store."""
    gpu = torch.cuda.is_available()
    defaults = {
        "bf16": gpu and torch.cuda.is_bf16_supported() and not fields.get("fp16"),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "logging_nan_inf_filter": False,  # a loss that is not a number is to be seen, not averaged away
    }
    return defaults | fields | {"output_dir": str(context.scratch / "trainer"), "seed": context.config.seed}


def dataset(rows: list[Any]) -> Dataset:
    """Rows of stages.rows as the data set that TRL's trainers take."""
    return Dataset.from_list([row.columns() for row in rows])


class Progress(TrainerCallback):
    """Tells the console how far the training is, and stops it where the loss is no number any more."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.note = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.progress(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or (loss := logs.get("loss")) is None:
            return
        self.note = f"loss {loss:.3f}"
        if not math.isfinite(loss):
            raise BadInput(
                f"step {state.global_step}: the loss is {loss} at learning rate {logs['learning_rate']:.3g};"
                " lower train.learning_rate or look at the rows of this step"
            )


def train(trainer: SFTTrainer | DPOTrainer, context: Context) -> dict[str, Any]:
    """Train, publish the model, and say how it went. A LoRA adapter is kept apart and merged into the model."""
    trainer.add_callback(Progress(context))
    result = trainer.train()
    metrics: dict[str, Any] = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "tokens": int(trainer._total_train_tokens),
        "seconds": round(result.metrics["train_runtime"], 1),
    }
    if trainer.eval_dataset is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    for name in ("train_loss", "eval_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise BadInput(f"the {name} is {metrics[name]}; lower train.learning_rate or look at the rows")
    lines = [json.dumps(_timeless(row), sort_keys=True) + "\n" for row in trainer.state.log_history]
    (context.out / "training_log.jsonl").write_text("".join(lines))
    _publish(trainer.model, trainer.processing_class, context.out)
    return metrics


def _publish(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the model and tokenizer so that from_pretrained(out) loads them; an adapter also goes to out/adapter."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(out / "adapter"))
        model = model.merge_and_unload()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log without what differs between two equal trainings."""
    return {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second", "_per_sec"))}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
