"""Rows -> tokens with segments, and batches with labels and weights.

Each token is marked once as prompt or completion; its weight is looked up when a batch is collated, so the same
prepared rows serve every pair of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

PROMPT, COMPLETION = 0, 1
"""Values of the `segments` column."""


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, **map_options: Any
) -> Dataset:
    """Tokenise rows of `prompt` and `completion` (text or messages), or of `text`.

    Returns columns `input_ids` and `segments`, lists of equal length, cut at `max_length` on the right. Text gets the
    EOS token at its end, as in TRL; messages get what the chat template writes. Rows of `text` are all completion.
    """

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts = rows.get("prompt") or [""] * len(rows["text"])
        completions = rows["completion"] if "completion" in rows else rows["text"]
        chat = not isinstance(completions[0], str)
        render = _render_chat if chat else _render_text
        texts, starts = zip(*(render(tokenizer, *row) for row in zip(prompts, completions, strict=True)), strict=True)
        encoded = tokenizer(list(texts), add_special_tokens=not chat, return_offsets_mapping=True)
        segments = [_segments(offsets, start) for offsets, start in zip(encoded["offset_mapping"], starts, strict=True)]
        return {
            "input_ids": [ids[:max_length] for ids in encoded["input_ids"]],
            "segments": [row[:max_length] for row in segments],
        }

    return dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, **map_options)


def _render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[str, int]:
    """The whole text of a row, and the character where its completion starts."""
    eos = tokenizer.eos_token or ""
    return prompt + completion + ("" if completion.endswith(eos) else eos), len(prompt)


def _render_chat(tokenizer: PreTrainedTokenizerBase, prompt: list[Any], completion: list[Any]) -> tuple[str, int]:
    """Likewise for messages: the completion starts where the text stops being what the model is prompted with."""
    asked = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(prompt + completion, tokenize=False))
    pairs = enumerate(zip(asked, whole, strict=False))
    return whole, next((place for place, (a, b) in pairs if a != b), min(len(asked), len(whole)))


def _segments(offsets: list[tuple[int, int]], start: int) -> list[int]:
    """The segment of each token; one that reaches over the boundary belongs to the completion, where it is judged."""
    return [COMPLETION if end > start else PROMPT for _, end in offsets]


@dataclass
class WeightedCollator:
    """Pads rows on the right into a batch with labels and weights.

    A batch holds `input_ids`, `attention_mask` and `labels`, int64, and `loss_weights`, float32, all of shape
    (rows, longest row). `labels` is -100 at padding, at a row's first token, which nothing predicts, and at tokens of
    weight 0, so that counting labels counts the predicted tokens of non-zero weight.
    """

    pad_token_id: int
    prompt_weight: float
    completion_weight: float
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        by_segment = torch.tensor([self.prompt_weight, self.completion_weight])
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        weights = torch.zeros(shape)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            attention_mask[index, :length] = 1
            weights[index, 1:length] = by_segment[torch.tensor(row["segments"][1:], dtype=torch.long)]
        labels = input_ids.masked_fill(weights == 0, -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "loss_weights": weights}
