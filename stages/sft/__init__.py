"""Weighted instruction tuning: `from stages.sft import WITTrainer, WITConfig`.

rows -> stages.data (tokens with segments) -> row_filter (rows with weighted tokens) -> packing
-> collator (labels and weights) -> trainer (the loss, with head on CPUs; loss_metrics) -> stages.training

The trainer is imported on first use: reading a recipe must not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.sft.trainer import WITConfig, WITTrainer

__all__ = ["WITConfig", "WITTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from stages.sft import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
