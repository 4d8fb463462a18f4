"""WeightedCollator on small hand-written prepared rows."""

from __future__ import annotations

import pytest
import torch

from stages.data.segments import weights_by_segment
from stages.sft.collator import WeightedCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8], "segments": [0, 0, 1, 1], "row": 3},
    {"input_ids": [5, 6], "segments": [0, 1], "row": 9},
]


@pytest.mark.parametrize(
    ("weights", "labels", "expected"),
    [
        ((0.0, 1.0), [[-100, -100, 7, 8], [-100, 6, -100, -100]], [[0, 0, 1, 1], [0, 1, 0, 0]]),
        ((0.25, 0.5), [[-100, 6, 7, 8], [-100, 6, -100, -100]], [[0, 0.25, 0.5, 0.5], [0, 0.5, 0, 0]]),
        ((0.5, 0.0), [[-100, 6, -100, -100], [-100, -100, -100, -100]], [[0, 0.5, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_labels_and_weights(weights: tuple[float, float], labels: list, expected: list) -> None:
    """No label at the first token, at padding or at weight 0; padding follows from the length, not the token id."""
    batch = WeightedCollator(pad_token_id=6, segment_weights=weights_by_segment(*weights))(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == labels
    assert torch.equal(batch["loss_weights"], torch.tensor(expected, dtype=torch.float32))
    assert batch["rows"] == [[3], [9]]
    assert "position_ids" not in batch


def test_system_and_template_default_to_the_prompt_weight() -> None:
    row = {"input_ids": [1] * 6, "segments": [0, 0, 1, 2, 3, 4]}  # prompt, prompt, completion, system, template, text
    assert WeightedCollator(0, weights_by_segment(0.25, 0.75))([row])["loss_weights"].tolist() == [
        [0, 0.25, 0.75, 0.25, 0.25, 0.75]
    ]
    assert WeightedCollator(0, weights_by_segment(0.25, 0.75, 0.5, 0.0))([row])["loss_weights"].tolist() == [
        [0, 0.25, 0.75, 0.5, 0, 0.75]
    ]


def test_multipliers_apply_and_a_zero_leaves_the_denominator() -> None:
    row = {"input_ids": [1, 2, 3, 4], "segments": [0, 0, 1, 1], "factors": [1.0, 2.0, 0.0, 0.5]}
    batch = WeightedCollator(0, weights_by_segment(0.25, 1))([row])
    assert batch["loss_weights"].tolist() == [[0, 0.5, 0, 0.5]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


def test_position_ids_restart_with_each_example() -> None:
    packs = [
        {"input_ids": [1, 2, 3, 4, 5], "segments": [0, 1, 1, 1, 1], "seq_lengths": [3, 2], "row": [7, 7, 7, 2, 2]},
        {"input_ids": [6, 7], "segments": [1, 1], "seq_lengths": [1, 1], "row": [4, 5]},
    ]
    batch = WeightedCollator(0, weights_by_segment(1, 1))(packs)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100] * 5]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["rows"] == [[7, 2], [4, 5]]


def test_flatten_concatenates_all_rows() -> None:
    batch = WeightedCollator(0, weights_by_segment(1, 1), flatten=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, -100, 6]]
    assert batch["rows"] == [[3, 9]]


def test_padding_to_a_multiple() -> None:
    collator = WeightedCollator(0, weights_by_segment(0, 1), pad_to_multiple_of=4)
    assert collator([{"input_ids": [1] * 5, "segments": [1] * 5}])["input_ids"].shape == (1, 8)
