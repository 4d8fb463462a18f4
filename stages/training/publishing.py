"""Publish the trained model, and check that it computes what was trained."""

from __future__ import annotations

import copy
import gc

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.base import Context, UserError
from stages.training.adapters import merge, save_adapter, untie
from stages.training.model_io import load_model
from stages.training.trainer_internals import TRLTrainer, tokenizer_of

CHECKED_TOKENS = 32


def publish(trainer: TRLTrainer, context: Context, subtracted: dict[str, Tensor]) -> None:
    """Write model and tokenizer to context.out; an adapter also goes to `adapter` in it. The trainer ends with this.

    All ranks call it, because each may hold a part of the weights; rank 0 writes. An adapter is merged into the model
    that training started from, loaded again: the adapter's own copy of it may be quantised, or changed.

    Args:
        subtracted: Of adapters.subtracted_weights.

    Raises:
        UserError: The published model does not compute what the trained one does.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in gathered.items()}  # torch.compile's prefix
    del gathered
    is_first = trainer.is_world_process_zero()
    trainer.accelerator.end_training()  # no rank waits for another from here on
    if not is_first:
        return
    tokenizer_of(trainer).save_pretrained(context.out)
    if isinstance(model, PeftModel):
        _publish_adapter(trainer, model, weights, context, subtracted)
    else:
        tied = model.all_tied_weights_keys  # gathered as copies, which save_pretrained would write twice
        model.save_pretrained(
            context.out, state_dict={name: weight for name, weight in weights.items() if name not in tied}
        )


def _publish_adapter(
    trainer: TRLTrainer, model: PeftModel, weights: dict[str, Tensor], context: Context, subtracted: dict[str, Tensor]
) -> None:
    """Publish adapter and merged model, with one model in memory at a time (two with several ranks)."""
    stage = context.config
    save_adapter(model, weights, subtracted, context.out / "adapter")
    tokens = trainer.data_collator([trainer.train_dataset[0]])["input_ids"][:1, :CHECKED_TOKENS]
    tolerance, training_tolerance = _tolerance(model), _tolerance(model, trainer)
    is_comparable = stage.quantization is None and (stage.launch is None or stage.launch.sharding is None)
    trained_logits = _logits(model, tokens) if is_comparable else None
    config, generation_config = copy.deepcopy(model.config), model.generation_config
    vars(config).pop("quantization_config", None)
    if trainer.accelerator.num_processes == 1:
        _free_memory(trainer)
    del model, weights
    gc.collect()

    # the default attention runs on CPUs, too
    options = {k: v for k, v in stage.model_init.items() if k not in ("attn_implementation", "use_kernels")}
    base = load_model(context.inputs["model"].path, stage.seed, options, trust_remote_code=stage.trust_remote_code)
    was_tied = untie(base)
    adapted = PeftModel.from_pretrained(base, str(context.out / "adapter"), torch_device="cpu")
    adapter_logits = _logits(adapted, tokens)
    if trained_logits is not None:
        _compare(
            adapter_logits, trained_logits, training_tolerance, "the adapter on the model that training started from"
        )
    merged = merge(adapted, was_tied)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings
    merged.config, merged.generation_config = config, generation_config  # with the special tokens of training
    merged.save_pretrained(context.out)
    del base, adapted, merged
    gc.collect()
    published = load_model(context.out, stage.seed, options, trust_remote_code=stage.trust_remote_code)
    _compare(_logits(published, tokens), adapter_logits, tolerance, "the model with its adapter merged in")


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()


def _compare(logits: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise UserError if the logits differ by more than a share of the spread of the expected ones."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    difference = (logits - expected).norm()
    if not difference <= tolerance * spread + 1e-6:  # not a number is a difference as well
        raise UserError(
            f"{what} does not compute what was trained: its logits differ by {difference / spread:.2g} of their spread,"
            f" and rounding explains {tolerance:.2g}; nothing is published. Change the options of lora",
            key="lora",
        )


def _tolerance(model: PreTrainedModel, trainer: TRLTrainer | None = None) -> float:
    """The relative difference of logits that rounding explains: 1e-3 in float32.

    In a narrower dtype, each layer rounds the hidden states twice; twice the sum of these errors is still rounding.
    """
    dtypes = [model.dtype]
    if trainer is not None:
        dtypes.append({"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision))
        dtypes.append(torch.float16 if torch.backends.cuda.matmul.allow_tf32 else None)  # 10 bits as well
    epsilon = max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 32)
    return max(1e-3, epsilon * 2 * (2 * layers) ** 0.5)


def _free_memory(trainer: TRLTrainer) -> None:
    """Drop the trained weights and the optimiser's state: with them, two models would be in memory while merging."""
    for holder in (trainer, trainer.callback_handler):
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(holder, name, None)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.accelerator.free_memory()
