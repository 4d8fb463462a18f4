"""Write a trained model as a folder that from_pretrained loads."""

from __future__ import annotations

import gc

from peft import PeftModel
from transformers import PreTrainedModel

from stages.base import Context
from stages.training.model_loading import load_model
from stages.training.trainer_internals import TRLTrainer, tokenizer_of


def publish(trainer: TRLTrainer, context: Context) -> None:
    """Write model and tokenizer to context.out; an adapter also goes to `adapter` in it. The trainer ends with this.

    All ranks call it, because each may hold a part of the weights; rank 0 writes. An adapter is merged into the model
    that training started from, loaded again: the adapter's own copy of it may be quantised.
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
        model.active_peft_config.base_model_name_or_path = ""  # no path of this machine; stage.json names the base
        model.save_pretrained(str(context.out / "adapter"), state_dict=weights)
        (context.out / "adapter" / "README.md").unlink()  # PEFT's empty form, which contains that path as well
        if trainer.accelerator.num_processes == 1:
            _free_memory(trainer)
        del model, weights
        gc.collect()
        _merge_adapter(context).save_pretrained(context.out)
    else:
        tied = model.all_tied_weights_keys  # gathered as copies, which save_pretrained would write twice
        model.save_pretrained(
            context.out, state_dict={name: weight for name, weight in weights.items() if name not in tied}
        )


def _merge_adapter(context: Context) -> PreTrainedModel:
    """The model that training started from, in the dtype of training, with the published adapter merged in."""
    options = context.config.train.model_dump().get("model_init_kwargs")
    trusted = context.config.trust_remote_code
    base = load_model(context.inputs["model"].path, context.config.seed, options, trust_remote_code=trusted)
    return PeftModel.from_pretrained(base, str(context.out / "adapter"), torch_device="cpu").merge_and_unload()


def _free_memory(trainer: TRLTrainer) -> None:
    """Drop the trained weights and the optimiser's state: with them, two models would be in memory while merging."""
    for holder in (trainer, trainer.callback_handler):
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(holder, name, None)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.accelerator.free_memory()
