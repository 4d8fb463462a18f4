"""Properties for any rows: segments cover the right text, and packing moves examples without changing them."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

import numpy
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.segments import Segment, weights_by_segment
from stages.data.tokenization import Preparer, prepare
from stages.sft.collator import WeightedCollator
from stages.sft.packing import pack
from stages.sft.row_filter import select
from tests.stages.data.test_tokenization import CHATML, tokenizer

TOKENIZER = tokenizer(CHATML)
PIECES = st.sampled_from(["user", "assistant", "<|im_end|>", "<|im_start|>assistant\n", "<end>", "\n", "  ", "é", "語"])
WORDS = st.lists(st.one_of(PIECES, st.text(max_size=8)), min_size=1, max_size=4).map("".join).filter(str.strip)
WEIGHT = st.sampled_from([0.0, 0.2, 0.5, 1.0])


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """An optional system message, then turns of user and assistant."""
    system = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    pairs = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
    roles = [{"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair, strict=True)]
    return system + roles


def expected_parts(messages: list[dict[str, Any]], last_only: bool) -> list[tuple[str, str]]:
    """(segment name, text) of the messages rendered as ChatML, message by message."""
    parts: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        parts.append(("template", f"<|im_start|>{message['role']}\n"))
        if message["role"] == "assistant" and (not last_only or index == len(messages) - 1):
            parts.append(("completion", message["content"] + "<|im_end|>\n"))
            continue
        words = message["content"].strip()
        lead, trail = message["content"].split(words, 1)
        name = "system" if message["role"] == "system" else "prompt"
        parts += [("template", lead), (name, words), ("template", trail + "<|im_end|>\n")]
    full = [part for part in parts if part[1]]
    return [(name, "".join(text for _, text in group)) for name, group in groupby(full, key=lambda part: part[0])]


@settings(max_examples=150, deadline=None)
@given(conversations(), st.booleans())
def test_segments_of_any_conversation(messages: list[dict[str, Any]], last_only: bool) -> None:
    preparer = Preparer(TOKENIZER, None, "last" if last_only else "all")
    row = preparer({"messages": [messages]}, [0]).to_pylist()[0]
    assert row["problem"] == ""
    pairs = zip(row["segments"], row["input_ids"], strict=True)
    parts = [
        (Segment(segment).name.lower(), TOKENIZER.decode([i for _, i in group]))
        for segment, group in groupby(pairs, key=lambda pair: pair[0])
    ]
    assert parts == expected_parts(messages, last_only)


@settings(max_examples=40, deadline=None)
@given(st.lists(conversations(), min_size=2, max_size=6))
def test_a_batch_is_prepared_like_its_single_rows(rows: list[list[dict[str, Any]]]) -> None:
    together = Preparer(TOKENIZER, 60)({"messages": rows}, list(range(len(rows)))).to_pylist()
    alone = [Preparer(TOKENIZER, 60)({"messages": [row]}, [i]).to_pylist()[0] for i, row in enumerate(rows)]
    assert together == alone


@st.composite
def token_rows(draw: Any) -> list[dict[str, Any]]:
    """Pre-tokenised rows; token ids identify the row, to recognise examples after packing."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    return [
        {"input_ids": [row] * length, "loss_weights": draw(st.lists(WEIGHT, min_size=length, max_size=length))}
        for row, length in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(token_rows(), st.integers(12, 30))
def test_packing_moves_complete_examples_and_loses_none(rows: list[dict[str, Any]], width: int) -> None:
    packs = pack(prepare(Dataset.from_list(rows), Preparer(TOKENIZER, width)), width)
    examples = []
    for packed in packs:
        assert len(packed["input_ids"]) == sum(packed["seq_lengths"]) <= width
        ends = numpy.cumsum(packed["seq_lengths"])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            examples.append((tuple(packed["input_ids"][start:end]), tuple(packed["factors"][start:end])))
    before = [(tuple(row["input_ids"]), tuple(numpy.float32(row["loss_weights"]).tolist())) for row in rows]
    assert Counter(examples) == Counter(before)


@settings(max_examples=60, deadline=None)
@given(token_rows(), st.integers(12, 30), st.sampled_from([None, 8]))
def test_every_layout_weighs_the_same_tokens(rows: list[dict[str, Any]], width: int, multiple: int | None) -> None:
    """Counted independently: the tokens with a weight after the first token of each example."""
    prepared = prepare(Dataset.from_list(rows), Preparer(TOKENIZER, width))
    expected = Counter(
        (token, numpy.float32(weight).item())
        for row in rows
        for token, weight in list(zip(row["input_ids"], row["loss_weights"], strict=True))[1:]
        if weight
    )
    segment_weights = weights_by_segment(0.3, 0.7)
    packs = pack(prepared, width)
    for flatten, data in ((False, prepared), (True, prepared), (False, packs), (True, packs)):
        batch = WeightedCollator(0, segment_weights, multiple, flatten)(list(data))
        is_weighted = batch["loss_weights"] != 0
        assert (batch["labels"] != -100).equal(is_weighted)
        tokens = batch["labels"][is_weighted].tolist()
        assert Counter(zip(tokens, batch["loss_weights"][is_weighted].tolist(), strict=True)) == expected
        if "position_ids" in batch:
            starts = (batch["position_ids"] == 0) & (batch["attention_mask"] == 1)
            assert int(starts.sum()) == len(rows)
    assert select(prepared, segment_weights)[1].weighted.get("given", 0) == sum(expected.values())
