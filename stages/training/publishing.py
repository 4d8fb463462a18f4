"""Publish the trained model, and check that it computes what was trained."""

import copy
import gc
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.base import Context, UserError
from stages.library_options.option_models import Options
from stages.training.model_io import load_model
from stages.training.trainer_internals import TRLTrainer


def subtracted_weights(model: nn.Module, lora: Options | None) -> dict[str, Tensor]:
    """Copy the adapter's first matrices, by their names in its file, if it starts with W - s B0 A0 in place of W."""
    start = "" if lora is None else str(lora.model_dump().get("init_lora_weights"))
    return {
        name.replace(".default.", "."): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if start.startswith(("pissa", "olora")) and (".lora_A.default." in name or ".lora_B.default." in name)
    }


def publish(trainer: TRLTrainer, context: Context, subtracted: dict[str, Tensor]) -> None:
    """Write model and tokenizer to context.out; an adapter also goes to `adapter` in it. The trainer ends with this.

    All ranks call it, because each may hold a part of the weights; rank 0 writes. An adapter is merged into the model
    that training started from, loaded again: the adapter's own copy of it may be quantised, or changed.

    Args:
        subtracted: What `subtracted_weights` returned before training.

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
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(context.out)
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
    _save_adapter(model, weights, subtracted, context.out / "adapter")
    rows: Any = trainer.train_dataset
    tokens = trainer.data_collator([rows[0]])["input_ids"][:1, :32]
    is_comparable = stage.quantization is None and (stage.launch is None or stage.launch.sharding is None)
    trained_logits = _logits(model, tokens) if is_comparable else None
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    if trainer.args.tf32 or trainer.args.torch_compile:  # which turns TF32 on
        narrow = narrow or torch.float16  # of as many bits
    config, generation_config = copy.deepcopy(model.config), model.generation_config
    vars(config).pop("quantization_config", None)
    if trainer.accelerator.num_processes == 1:  # with the optimiser's state, two models would be in memory
        for holder in (trainer, trainer.callback_handler):
            for name in ("model", "optimizer", "lr_scheduler"):
                setattr(holder, name, None)
        trainer.model_wrapped = None  # type: ignore[assignment]
        trainer.accelerator.free_memory()
    del model, weights
    gc.collect()

    # the default attention runs on CPUs, too
    options = {k: v for k, v in stage.model_init.items() if k not in ("attn_implementation", "use_kernels")}
    base = load_model(context.inputs["model"].path, stage.seed, options, trust_remote_code=stage.trust_remote_code)
    head: Any = base.get_output_embeddings()
    embeddings: Any = base.get_input_embeddings()
    if is_tied := head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())  # else merging would change both
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    adapted: Any = PeftModel.from_pretrained(base, str(context.out / "adapter"), torch_device="cpu")
    logits = _logits(adapted, tokens)
    if trained_logits is not None:
        _compare(logits, trained_logits, base, narrow, "the adapter on the model that training started from")
    merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():  # those of modules_to_save are float32
        parameter.data = parameter.data.to(dtypes[name])
    if is_tied:
        head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = torch.equal(head.weight, embeddings.weight)
        if config.tie_word_embeddings:
            head.weight = embeddings.weight
    merged.config, merged.generation_config = config, generation_config  # with the special tokens of training
    merged.save_pretrained(context.out)
    del base, adapted, merged, head
    gc.collect()
    published = load_model(context.out, stage.seed, options, trust_remote_code=stage.trust_remote_code)
    _compare(_logits(published, tokens), logits, published, None, "the model with its adapter merged in")


def _save_adapter(model: PeftModel, weights: dict[str, Tensor], subtracted: dict[str, Tensor], folder: Path) -> None:
    """Save the trained adapter so that it fits the model that training started from.

    If `subtracted` has B0 and A0, W - s B0 A0 + s B A was trained. The file then has B' = [B, -B0] and A' = [A; A0], at
    the same scale s. PEFT's own conversion would lose modules_to_save, DoRA's magnitudes and trained tokens.
    """
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = ""  # no path of this machine; stage.json names the base
    if subtracted:
        config.init_lora_weights = True
    model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
    (folder / "README.md").unlink()  # PEFT's empty form, which contains that path as well
    if not subtracted:
        return
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, start in subtracted.items():
        parts, dim = ((tensors[name], start), 0) if ".lora_A." in name else ((tensors[name], -start), 1)
        tensors[name] = torch.cat(parts, dim).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    alpha_factor = math.sqrt(2) if saved["use_rslora"] else 2  # s is alpha / sqrt(r), or alpha / r
    for key, patterns, factor in (("r", "rank_pattern", 2), ("lora_alpha", "alpha_pattern", alpha_factor)):
        saved[key] *= factor
        saved[patterns] = {name: value * factor for name, value in saved[patterns].items()}
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()


def _compare(logits: Tensor, expected: Tensor, model: Any, narrow: torch.dtype | None, subject: str) -> None:
    """Raise UserError if logits differ by more than rounding: 0.001 of their spread in float32.

    In a narrower dtype, each layer rounds the hidden states twice; twice the sum of these errors is still rounding.
    """
    epsilon = max(torch.finfo(dtype).eps for dtype in (model.dtype, narrow) if dtype is not None)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 32)
    tolerance = max(1e-3, epsilon * 2 * (2 * layers) ** 0.5)
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    difference = (logits - expected).norm()
    if not difference <= tolerance * spread + 1e-6:  # not a number is a difference as well
        raise UserError(
            f"lora: {subject} does not compute what was trained: its logits differ by {difference / spread:.2g} of"
            f" their spread, and rounding explains {tolerance:.2g}; nothing is published. Change the options of lora"
        )
