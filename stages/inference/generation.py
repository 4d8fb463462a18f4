"""Generates answers in a batch: the shared prefix is computed once, and finished answers leave the batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.inference.growing_cache import growing_cache
from stages.inference.prefix_tree import LEAST_SHARED, Tokens, shared_length
from stages.inference.requests import GenerationRequest

_MOST_UNFINISHED = 0.875
"""Share of unfinished rows from which on finished ones are dropped: that copies the cache."""


class Batch:
    """Prompts with the tokens that follow them, a row each."""

    @torch.inference_mode()
    def __init__(self, model: Any, prompts: Sequence[Tokens]) -> None:
        """Read the prompts; `logits` are then those of their next tokens, [rows, vocabulary], in float32."""
        self.model = model
        self.cache = growing_cache()
        shared = min(shared_length(min(prompts), max(prompts)), *(len(prompt) - 1 for prompt in prompts))
        shared = shared if len(prompts) > 1 and shared >= LEAST_SHARED else 0
        if shared:
            self._forward(torch.tensor([prompts[0][:shared]]), None, torch.arange(shared)[None])
            for layer in self.cache.layers:
                layer.select(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
        width = max(map(len, prompts)) - shared
        rests = [prompt[shared:] for prompt in prompts]
        ids = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests])
        self.mask = torch.tensor([[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests])
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        self.next_positions = positions[:, -1:] + 1
        self.logits = self._forward(ids, self.mask, positions)

    @torch.inference_mode()
    def add(self, tokens: Tensor) -> None:
        """Add a token, [rows], to each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.logits = self._forward(tokens[:, None], self.mask, self.next_positions)
        self.next_positions = self.next_positions + 1

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep rows."""
        kept = torch.tensor(rows)
        self.mask, self.next_positions, self.logits = self.mask[kept], self.next_positions[kept], self.logits[rows]
        for layer in self.cache.layers:
            layer.select(kept.to(self.model.device))

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=None if mask is None or bool(mask.all()) else mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def generate(
    model: Any, requests: Sequence[GenerationRequest], is_last: Callable[[GenerationRequest, list[int]], bool]
) -> Iterator[list[list[int]]]:
    """Yield the tokens of each answer so far, in lists that grow with each pass, until all are complete.

    `is_last(request, answer)` says whether an answer so far is complete.
    """
    batch = Batch(model, [request.prompt for request in requests])
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    answers: list[list[int]] = [[] for _ in requests]
    rows, finished = list(range(len(requests))), set[int]()
    while True:
        tokens = batch.logits.argmax(-1).cpu()
        for row, number in enumerate(rows):
            if temperature := requests[number].temperature:
                weights = torch.softmax(batch.logits[row] / temperature, -1).cpu()
                tokens[row] = torch.multinomial(weights, 1, generator=generators[number])
            if number not in finished:
                answers[number].append(int(tokens[row]))
                if is_last(requests[number], answers[number]):
                    finished.add(number)
        yield answers
        unfinished = [row for row, number in enumerate(rows) if number not in finished]
        if not unfinished:
            return
        if len(unfinished) <= _MOST_UNFINISHED * len(rows):
            batch.select(unfinished)
            rows, tokens = [rows[row] for row in unfinished], tokens[unfinished]
        batch.add(tokens)
