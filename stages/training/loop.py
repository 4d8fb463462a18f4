"""What every stage that trains a model shares: loading, LoRA, defaults fit for the machine, progress, publishing."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import import_utils
from trl import DPOTrainer, SFTTrainer

from stages.base import Context, UserError
from stages.library_options.option_models import Options
from stages.models.model_folder import why_not_loaded
from stages.records.metrics import Metrics
from stages.training.checkpoints import CHECKPOINTS_KEPT, Checkpoints
from stages.training.trackers import one_run, told

_KEPT: list[Any] = []
"""Trainers of several ranks: freeing what torch holds for them can wait forever for a thread that waits for Python."""


def load_tokenizer(path: Path, rows: list[Any], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. Raises UserError where there is none, or one that cannot serve rows like those of
    stages.rows in `rows`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no tokenizer that can be loaded: {why_not_loaded(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer gives no character offsets; save it as a fast tokenizer")
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, so no answer could end; set one")
    values = [value for row in rows for value in row.columns().values()]
    if tokenizer.chat_template is None and any(isinstance(value[0], dict) for value in values if value):
        raise UserError(
            f"{path}: its tokenizer has no chat template, and the rows are messages; give rows of plain text, for"
            " example by 'format: official' for instruction data, or a model with a chat template"
        )
    return tokenizer


def load_model(
    path: Path,
    seed: int,
    options: dict[str, Any] | None,
    random_init: bool = False,
    quantization: Options | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `path`, from safetensors only.

    Args:
        path: a folder that from_pretrained loads.
        seed: of what is drawn: random weights here, the adapter's later.
        options: TRL's `model_init_kwargs`; the weights are float32 where they say nothing of the dtype.
        random_init: draw the weights instead of reading them.
        quantization: a recipe's section of that name; the weights are quantised while they are read.
        trust_remote_code: whether the folder's own Python files may run.

    Raises:
        UserError: there is no such model, or it cannot be quantised on this machine.
    """
    set_seed(seed)
    options = {"dtype": torch.float32} | (options or {}) | _quantized(quantization)
    options["trust_remote_code"] = trust_remote_code  # never None, with which transformers asks on the terminal
    if not trust_remote_code:
        _no_kernel_instead(options.get("attn_implementation", ""))
    try:
        if random_init:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            return AutoModelForCausalLM.from_config(config, **options)
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: holds no model that can be loaded: {why_not_loaded(error)}") from None
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) and "attn_implementation" in options:
            asked = options["attn_implementation"]
            raise UserError(
                f"train.model_init_kwargs.attn_implementation: {asked} does not work here: {why_not_loaded(error)}"
            ) from None
        if quantization is None:
            raise
        raise UserError(f"quantization: bitsandbytes does not work on this machine: {why_not_loaded(error)}") from None
    for module in model.modules() if quantization is not None else ():
        # bitsandbytes would repack a layer's weights for CPUs at the first evaluation, and that kernel has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _no_kernel_instead(asked: str) -> None:
    """Raise UserError where transformers would put a kernel of the hub, others' code, in the place of a flash attention
    that is not installed."""
    here = getattr(import_utils, asked.replace("flash_attention_", "is_flash_attn_") + "_available", None)
    if here is not None and not here() and import_utils.is_kernels_available():
        raise UserError(
            f"train.model_init_kwargs.attn_implementation: {asked} is not installed, and in its place transformers"
            " would run a kernel from the hub, which is code of others; install flash-attn, or add"
            " trust_remote_code: true to the stage if you trust it"
        )


def _quantized(quantization: Options | None) -> dict[str, Any]:
    """What from_pretrained takes to quantise: how, and on which GPU. Raises UserError."""
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization: bitsandbytes is not installed; pip install -e '.[qlora]'")
    try:
        config = BitsAndBytesConfig(**quantization.model_dump())
    except (TypeError, ValueError) as error:
        raise UserError(f"quantization: {why_not_loaded(error)}") from None
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def lora_config(lora: Options | None) -> LoraConfig | None:
    """PEFT's LoraConfig of a recipe's `lora` section."""
    return None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())


def arguments(context: Context, fields: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a TRL config with `Told`: the recipe's fields over defaults that fit the machine and the
    store.

    Checkpoints are asked for by stages.checkpoints, not by transformers, which would save one after the last step, too.

    Raises UserError for what this machine has no kernels for.
    """
    gpu = torch.cuda.is_available()
    if fields.get("use_liger_kernel") and not gpu:
        raise UserError("train.use_liger_kernel: Liger's kernels run on GPUs, and there is none here; leave it out")
    defaults = {
        "bf16": gpu and torch.cuda.is_bf16_supported() and not fields.get("fp16"),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "logging_nan_inf_filter": False,  # a loss that is not a number is to be seen, not averaged away
    }
    fixed = {"output_dir": str(context.checkpoints), "save_total_limit": CHECKPOINTS_KEPT, "seed": context.config.seed}
    return defaults | told(context) | fields | fixed


def dataset(rows: list[Any]) -> Dataset:
    """Rows of stages.rows as the data set that TRL's trainers take."""
    return Dataset.from_list([row.columns() for row in rows])


class Progress(TrainerCallback):
    """Tells the console how far the training is, and stops it where the loss is no number any more."""

    def __init__(self, trainer: SFTTrainer | DPOTrainer, context: Context) -> None:
        self.trainer, self.context = trainer, context
        self.note = ""
        self._since: tuple[float, float] | None = None
        """When the steps since the last log began, and the tokens before them."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter(), self.trainer._total_train_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.progress(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or (loss := logs.get("loss")) is None:
            return
        self.note = f"loss {loss:.3f}, {self._speed(logs):,.0f} tokens/s"
        self.context.progress(state.global_step, state.max_steps, self.note)
        if not math.isfinite(loss):
            raise UserError(
                f"step {state.global_step}: the loss is {loss} at learning rate {logs['learning_rate']:.3g};"
                " lower train.learning_rate or look at the rows of this step"
            )

    def tell(self, what: str) -> None:
        """What is done after the last step."""
        state = self.trainer.state
        self.context.progress(state.global_step, state.max_steps, ", ".join(filter(None, (self.note, what))))

    def _speed(self, logs: dict[str, Any]) -> float:
        """Tokens per second since the last log, as WITTrainer's log has them; counted here for TRL's own."""
        began, before = self._since or (0.0, 0.0)
        self._since = None
        counted = (self.trainer._total_train_tokens - before) / (time.perf_counter() - began)
        return logs.get("tokens_per_second", counted)


def train(trainer: SFTTrainer | DPOTrainer, context: Context, sums: dict[str, torch.Tensor] | None = None) -> Metrics:
    """Train, publish the model, and say how it went. Every rank calls it; only rank 0 publishes.

    Goes on from the last checkpoint of an interrupted attempt, with the `sums` of the trainer's own figures.
    """
    if trainer.accelerator.num_processes > 1:
        _KEPT.append(trainer)
    checkpoints = Checkpoints(trainer, "save_steps" in context.config.train.model_dump(), sums or {})
    progress = Progress(trainer, context)
    for callback in (progress, checkpoints):
        trainer.add_callback(callback)
    with one_run(trainer, context, anew=checkpoints.found is None):
        result = trainer.train(resume_from_checkpoint=str(checkpoints.found) if checkpoints.found else None)
        if trainer.eval_dataset is not None:
            progress.tell("evaluating")
        evaluated = trainer.evaluate() if trainer.eval_dataset is not None else None
    metrics: dict[str, Any] = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "tokens": int(trainer._total_train_tokens),
        "seconds": round(checkpoints.elapsed(), 1),
        "notes": checkpoints.notes,
    }
    if evaluated is not None:
        metrics |= {name: value for name, value in _timeless(evaluated).items() if name != "epoch"}
    for name in ("train_loss", "eval_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise UserError(f"the {name} is {metrics[name]}; lower train.learning_rate or look at the rows")
    lines = [json.dumps(_timeless(row), sort_keys=True) + "\n" for row in trainer.state.log_history]
    (context.out / "training_log.jsonl").write_text("".join(lines))
    progress.tell("writing the model")
    _publish(trainer, context)
    return Metrics(**metrics)


def _publish(trainer: SFTTrainer | DPOTrainer, context: Context) -> None:
    """Write model and tokenizer so that from_pretrained(context.out) loads them; an adapter also goes to out/adapter.

    The weights are gathered by all ranks, for each may hold a part of them, and written by rank 0. An adapter is merged
    into the model that training started from, loaded anew: under it lay the same weights, perhaps quantised.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in gathered.items()}  # torch.compile's prefix
    del gathered
    first = trainer.is_world_process_zero()
    trainer.accelerator.end_training()  # no rank waits for another from here on
    if not first:
        return
    trainer._tokenizer.save_pretrained(context.out)
    if isinstance(model, PeftModel):
        model.active_peft_config.base_model_name_or_path = ""  # no path of this machine; stage.json names the base
        model.save_pretrained(str(context.out / "adapter"), state_dict=weights)
        (context.out / "adapter" / "README.md").unlink()  # an empty form, with that path again
        if trainer.accelerator.num_processes == 1:
            _let_go(trainer)
        del model, weights
        gc.collect()
        _merge(context).save_pretrained(context.out)
    else:
        tied = model.all_tied_weights_keys  # gathered as copies, which save_pretrained would not know for one tensor
        once = {name: weight for name, weight in weights.items() if name not in tied}
        model.save_pretrained(context.out, state_dict=once)


def _merge(context: Context) -> PreTrainedModel:
    """The model that training started from, in the dtype of training, with the adapter in out/adapter merged in."""
    options = context.config.train.model_dump().get("model_init_kwargs")
    trusted = context.config.trust_remote_code
    base = load_model(context.inputs["model"].path, context.config.seed, options, trust_remote_code=trusted)
    return PeftModel.from_pretrained(base, str(context.out / "adapter"), torch_device="cpu").merge_and_unload()


def _let_go(trainer: SFTTrainer | DPOTrainer) -> None:
    """Drop the trained weights and the optimiser's state, so that they are not in memory beside another model."""
    for holder in (trainer, trainer.callback_handler):
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(holder, name, None)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.accelerator.free_memory()


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log without what differs between two equal trainings."""
    return {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second", "_per_sec"))}
