"""A cache of keys and values that grows in place: transformers' own copies all of it for every token."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 128
"""Further tokens that a layer has room for once it had to grow."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, tokens, size], as views of larger tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: list[Tensor] = []
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; return all keys and values."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        start, end, new = self._length, self._length + key_states.shape[2], (key_states, value_states)
        if not self._buffers or end > self._buffers[0].shape[2]:
            grown = [each.new_empty(*each.shape[:2], end + _ROOM, each.shape[3]) for each in new]
            for buffer, old in zip(grown, self._buffers, strict=False):
                buffer[:, :, :start] = old[:, :, :start]
            self._buffers = grown
        for buffer, states in zip(self._buffers, new, strict=True):
            buffer[:, :, start:end] = states
        return self._show(end)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget as many of the last tokens as a negative number says."""
        if self._buffers:
            self._show(self._length + tokens_to_remove)

    def select(self, rows: Tensor) -> None:
        """Keep rows, which may repeat."""
        before, end = self._buffers, self._length
        self._buffers, self._length = [], 0
        self.update(*(buffer[rows, :, :end] for buffer in before))

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values


def growing_cache() -> Any:
    """Return an empty cache for any number of layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)
