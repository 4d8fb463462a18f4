"""Segments, labels and weights of small rows, counted by hand: the tokenizer makes one token of each byte."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from stages.sft.data import WeightedCollator, prepare
from tests.tiny import byte_tokenizer


def prepared(row: dict, max_length: int | None = None) -> tuple[str, list[int]]:
    """The decoded tokens of one row, and its segments."""
    tokenizer = byte_tokenizer()
    out = prepare(Dataset.from_list([row]), tokenizer, max_length)[0]
    return tokenizer.decode(out["input_ids"]), out["segments"]


def test_text_prompt_and_completion_with_eos() -> None:
    assert prepared({"prompt": "ab ", "completion": "cd"}) == ("ab cd<end>", [0, 0, 0, 1, 1, 1])


def test_eos_is_not_doubled() -> None:
    assert prepared({"prompt": "a", "completion": "b<end>"}) == ("ab<end>", [0, 1, 1])


def test_plain_text_is_all_completion() -> None:
    assert prepared({"text": "abc"}) == ("abc<end>", [1, 1, 1, 1])


def test_messages_by_the_chat_template() -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}
    text, segments = prepared(row)
    assert text == "user: hi\nassistant: yo<end>\n"
    prompt = len("user: hi\nassistant:")
    assert segments == [0] * prompt + [1] * (len(" yo") + 1 + len("\n"))


def test_letters_of_several_bytes() -> None:
    """Each byte of é is a token; all of them belong where the letter stands."""
    text, segments = prepared({"prompt": "é", "completion": "é"})
    assert (text, segments) == ("éé<end>", [0, 0, 1, 1, 1])


def test_truncation_keeps_the_start() -> None:
    assert prepared({"prompt": "abc", "completion": "def"}, max_length=4) == ("abcd", [0, 0, 0, 1])


def test_a_token_over_the_boundary_is_completion() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["bc"])
    out = prepare(Dataset.from_list([{"prompt": "ab", "completion": "cd"}]), tokenizer, None)[0]
    assert tokenizer.convert_ids_to_tokens(out["input_ids"]) == ["a", "bc", "d", "<end>"]
    assert out["segments"] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "labels", "expected"),
    [
        ((0.0, 1.0), [[-100, -100, 7, 8], [-100, 6, -100, -100]], [[0, 0, 1, 1], [0, 1, 0, 0]]),
        ((0.25, 0.5), [[-100, 6, 7, 8], [-100, 6, -100, -100]], [[0, 0.25, 0.5, 0.5], [0, 0.5, 0, 0]]),
        ((0.5, 0.0), [[-100, 6, -100, -100], [-100, -100, -100, -100]], [[0, 0.5, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_labels_and_weights(weights: tuple[float, float], labels: list, expected: list) -> None:
    """No label at the first token, at padding or at weight 0; padding is told by length, never by the id."""
    collator = WeightedCollator(pad_token_id=6, prompt_weight=weights[0], completion_weight=weights[1])
    rows = [{"input_ids": [5, 6, 7, 8], "segments": [0, 0, 1, 1]}, {"input_ids": [5, 6], "segments": [0, 1]}]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == labels
    assert torch.equal(batch["loss_weights"], torch.tensor(expected, dtype=torch.float32))


def test_padding_to_a_multiple() -> None:
    collator = WeightedCollator(0, 0.0, 1.0, pad_to_multiple_of=4)
    assert collator([{"input_ids": [1] * 5, "segments": [1] * 5}])["input_ids"].shape == (1, 8)
