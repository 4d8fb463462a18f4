"""The private attributes of transformers' and TRL's trainers that this project needs. No other module uses them;
WITTrainer overrides two private methods, `_prepare_dataset` and `_set_signature_columns_if_needed`; dpo's PairTrainer
overrides `_prepare_dataset`.

A resumed training logs the same figures as one without a break only if the sums behind the next log are restored, and
transformers has no public way to read or set them. tests/stages/training/test_trainer_internals.py fails when an update
of either library changes one.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import DPOTrainer, SFTTrainer

from stages.system.library_versions import require_version

TRLTrainer = SFTTrainer | DPOTrainer

# The versions in which the attributes below were checked.
require_version("transformers", "5")
require_version("trl", "1.16")


def attention_kernel(model: PreTrainedModel) -> str:
    """The name of the model's attention implementation, such as `sdpa` or `flash_attention_2`."""
    return model.config.get_text_config()._attn_implementation or ""


def trained_tokens(trainer: TRLTrainer) -> int:
    """Tokens that all ranks have trained on so far."""
    return int(trainer._total_train_tokens)


def add_trained_tokens(trainer: TRLTrainer, count: int) -> None:
    """Add to the tokens that all ranks have trained on."""
    trainer._total_train_tokens += count


def learning_rate(trainer: TRLTrainer) -> float:
    """The learning rate of the next optimiser step."""
    return trainer._get_learning_rate()


def metric_lists(trainer: TRLTrainer, mode: str) -> dict[str, list[float]]:
    """TRL's figures of each step since the last log, by name; `mode` is `train` or `eval`."""
    return trainer._metrics[mode]


def read_sums(trainer: TRLTrainer) -> dict[str, Any]:
    """The sums behind the next log, as JSON."""
    return {
        "loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "tokens": trained_tokens(trainer),
        "metrics": {name: values for name, values in metric_lists(trainer, "train").items() if values},
    }


def restore_sums(trainer: TRLTrainer, sums: dict[str, Any], device: torch.device) -> None:
    """Set the sums of `read_sums`; the metrics then cover all attempts of a training, not only the last."""
    trainer._initial_global_step = 0
    trainer._tr_loss = torch.tensor(sums["loss"], device=device)
    trainer._total_loss_scalar = sums["total_loss"]
    trainer._globalstep_last_logged = sums["last_logged"]
    trainer._total_train_tokens = sums["tokens"]
    metric_lists(trainer, "train").update(sums["metrics"])


@contextmanager
def preserved_figures(trainer: TRLTrainer) -> Iterator[None]:
    """Restore TRL's figures, and those of WITTrainer."""
    names = ("_metrics", "_total_train_tokens", "_log_start", "_micro_batches", "_attended")
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in names if name in vars(trainer)}
    sums = getattr(trainer, "train_metrics", None)
    before_sums = None if sums is None else sums.sums.clone()
    try:
        yield
    finally:
        vars(trainer).update(before)
        if sums is not None:
            sums.sums.copy_(before_sums)
