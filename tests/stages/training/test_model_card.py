"""A model card shows whatever names a training had, and does nothing else with them."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from stages.base import Input
from stages.records.metrics import Metrics, ScoreRow
from stages.training.model_card import card

EVIL = [
    "</code><script>alert(1)</script>",
    "rows`|`<img src=x onerror=alert(1)>.jsonl",
    "a\n---\nlicense: mit\n---\n# Headline",
    "```\n# Headline\n```",
    "\x1b[2J\x00.jsonl",
    "| x | y |",
    "[click](javascript:alert(1))",
]


@pytest.mark.parametrize("evil", EVIL)
def test_names_in_a_card_are_shown_and_never_carried_out(tmp_path: Path, evil: str) -> None:
    config = {
        "kind": "sft",
        "weights": {"prompt": 0.2, "completion": 0.8},
        "data": {"train": evil, "format": evil},
        "train": {"optim": evil},
    }
    inputs = {"model": Input(Path(), reference=evil), "train": Input(Path(), reference=evil)}
    metrics = Metrics(train_loss=1.5, data={"train": {"rows": 3}})
    scores = [
        ScoreRow(
            task=evil, metric=evil, filter="none", value=0.5, stderr=0.1, n=2, higher_is_better=True, headline=True
        )
    ]
    text = card(Input(tmp_path, "s", "sft", "", config, metrics, inputs), scores=scores)
    assert not re.search(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", text)
    front, body = text.split("\n---\n", 1)
    assert set(yaml.safe_load(front)) <= {"library_name", "model_name", "pipeline_tag", "tags", "model-index"}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inner = [each for token in tokens for each in token.children or []]
    assert not [token for token in (*tokens, *inner) if token.type.startswith("html")]
    assert {str(token.attrGet("href")) for token in inner if token.type == "link_open"} <= {
        "https://arxiv.org/abs/2507.07817"
    }
    headlines = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert not [line for line in headlines if "Headline" in line]
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("| ")]
    assert set(rows) <= {3, 4, 6}
