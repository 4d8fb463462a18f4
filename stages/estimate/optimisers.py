"""What an optimiser keeps of each trainable parameter."""

from __future__ import annotations

from stages.estimate.sizes import Sizes

_STATES = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""What a name of transformers' `optim` contains -> tensors of the parameter's size."""


def optimiser_bytes(name: str, sized: Sizes) -> tuple[int, bool]:
    """Bytes, in the dtype of the parameters unless the name says fewer bits; and whether the name is known (an unknown
    one is counted as AdamW)."""
    name = name.rpartition(".")[2].lower()
    if "adafactor" in name:
        return sized.factored, True
    states = next((count for part, count in _STATES.items() if part in name), None)
    count = 2 if states is None else states
    if "8bit" in name:
        return count * sized.trainable, states is not None
    if "4bit" in name:
        return count * sized.trainable // 2, states is not None
    return count * sized.trainable_bytes, states is not None
