"""What an optimiser keeps of each trainable parameter."""

from __future__ import annotations

from stages.estimate.sizes import Sizes

_STATES = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "lomo": 0}
"""What a name of transformers' `optim` contains -> tensors of the parameter's size."""
_FACTORED = ("adafactor", "adalomo")
"""Likewise of those that keep a row and a column of each matrix."""


def optimiser_bytes(name: str, sized: Sizes) -> int:
    """In the dtype of the parameters unless the name, one of transformers' `OptimizerNames`, says fewer bits. What
    projects gradients to a lower rank (GaLore, APOLLO) is counted as if it did not."""
    name = name.rpartition(".")[2].lower()
    if any(part in name for part in _FACTORED):
        return sized.factored
    count = next(count for part, count in _STATES.items() if part in name)
    if "8bit" in name:
        return count * sized.trainable
    if "4bit" in name:
        return count * sized.trainable // 2
    return count * sized.trainable_bytes
