"""Previewed rows, by hand, with the byte tokenizer, where a token is a byte."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stages.data.segments import Segment, weights_by_segment
from stages.preview.page import html_page
from stages.preview.token_display import Preview, PreviewedRow, TokenTexts, visible
from stages.sft.preview import display_row
from tests.tiny import byte_tokenizer

P, C, T = Segment.PROMPT, Segment.COMPLETION, Segment.TEMPLATE
WEIGHTS = weights_by_segment(prompt=0.2, completion=0.8, template=0.0)


def row(text: str, segments: list[Segment], /, **more: Any) -> dict[str, Any]:
    """A prepared row of `text` and <end>; the last segment extends to its end."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    filled = segments + segments[-1:] * (len(ids) - len(segments))
    return {"input_ids": ids, "segments": filled, "factors": [], "row": 1, "cut": 0, "merged": 0, "problem": ""} | more


def shown(*rows: dict[str, Any]) -> list[PreviewedRow]:
    return [display_row(each, TokenTexts(byte_tokenizer()), WEIGHTS) for each in rows]


def preview(*rows: dict[str, Any]) -> Preview:
    return Preview("wit", "rows.jsonl", 7, 32, {"prompt": 0.2, "completion": 0.8}, shown(*rows))


def printed(shown_preview: Preview, width: int = 80, **console: Any) -> str:
    screen = Console(file=io.StringIO(), width=width, **console)
    screen.print(shown_preview)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_weights_of_tokens_in_the_loss() -> None:
    """The first token is not predicted; the weight of a message multiplies."""
    example = shown(row("abcd", [P, P, C, C], factors=[1, 0.5, 1, 0.5, 0]))[0]
    assert [token.text for token in example.tokens] == ["a", "b", "c", "d", "<end>"]
    assert [token.weight for token in example.tokens] == [0, 0.1, 0.8, 0.4, 0]
    assert [token.special for token in example.tokens] == [False] * 4 + [True]
    assert example.weighted == {"prompt": 1, "completion": 2}
    assert example.counts == "5 tokens, 0 truncated; in the loss: 1 prompt (33%) + 2 completion (67%)"


def test_runs_and_the_boundary() -> None:
    example = shown(row("?Q\nab", [T, P, T, C, C]))[0]
    runs = [("".join(t.text for t in run.tokens), run.first.label, run.heading) for run in example.runs]
    assert runs == [
        ("?", "not predicted", ""),
        ("Q", "prompt ×0.2", ""),  # noqa: RUF001
        ("\n", "template ×0", ""),  # noqa: RUF001
        ("ab<end>", "completion ×0.8", "completion"),  # noqa: RUF001
    ]


def test_partial_and_invisible_characters() -> None:
    example = shown(row("é\t\x1b", [P, P, P, P]))[0]
    assert [token.text for token in example.tokens] == ["<0xC3>", "<0xA9>", "\t", "\x1b", "<end>"]
    assert visible(" a\tb\n\x1b\u202e\u00a0é") == "·a→b↵<U+001B><U+202E><U+00A0>é"


def test_tokens_of_a_sentencepiece_tokenizer() -> None:
    """A word with the space before it; byte fallback, for part of a character or a newline."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xC3>": 2, "<0x0A>": 3, "é": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [texts.text(id) for id in range(5)] == ["<unk>", " the", "<0xC3>", "\n", "é"]
    assert [texts.special(id) for id in range(5)] == [True, False, False, False, False]


def test_without_colours() -> None:
    output = printed(preview(row("Hi you\nab", [P] * 7 + [C])), color_system=None)
    assert output == (
        "wit: 1 of 7 rows of rows.jsonl\n"
        " prompt ×0.2    completion ×0.8   \n"  # noqa: RUF001
        "· space, ↵ line end, → tab; ¦ between tokens, ⟦special⟧\n"
        "\n"
        "rows.jsonl:1\n"
        "  10 tokens, 0 truncated; in the loss: 6 prompt (67%) + 3 completion (33%)\n"
        "    [not predicted] H\n"
        "      [prompt ×0.2] i¦·¦y¦o¦u¦↵\n"  # noqa: RUF001
        "                    ──────────── completion ────────────\n"
        "  [completion ×0.8] a¦b¦⟦<end>⟧\n"  # noqa: RUF001
    )


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    shown_row = preview(row("Hab", [P, C]))
    coloured = printed(shown_row, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;20;24;30;48;2;" in coloured
    assert "¦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(shown_row, force_terminal=True, color_system="truecolor")
    assert "48;2;" not in plain
    assert "a¦b¦⟦<end>⟧" in plain


def test_data_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in printed(preview(row("a\x1b[2J", [P])), color_system=None)


def test_long_rows_are_broken_at_tokens() -> None:
    lines = printed(preview(row("x" * 100, [P])), width=50, color_system=None).splitlines()
    assert max(map(len, lines[4:])) <= 50
    assert sum(line.count("x") for line in lines[6:]) == 100


def test_notes() -> None:
    weightless, truncated, bad = shown(
        row("ab", [T]), row("ab", [C], cut=3, merged=1), row("", [P], input_ids=[], segments=[], problem="is broken")
    )
    assert list(weightless.notes(4)) == ["all tokens have weight 0, so training skips this row"]
    assert list(truncated.notes(4)) == ["3 tokens truncated at max_length 4; raise train.max_length to keep them"]
    assert truncated.counts.endswith("; 1 across a segment boundary")
    assert list(bad.notes(4)) == ["this row cannot be used: is broken"]


def test_the_page_escapes_data() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<script>alert(1)</script>", '" onclick="x'])
    ids = tokenizer('<script>alert(1)</script>" onclick="x<b>').input_ids
    assert len(ids) == 5
    examples = [display_row(row("", [P], input_ids=ids, segments=[P] * 5), TokenTexts(tokenizer), WEIGHTS)]
    page = html_page(Preview("wit", "<i>.jsonl", 1, None, {"prompt": 0.2}, examples))
    assert "<script" not in page
    assert 'onclick="' not in page
    assert "<b>P" not in page
    assert "<i>.jsonl" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_shows_every_token_once() -> None:
    page = html_page(preview(row("a b\nc", [P, P, P, P, C])))
    assert page.count('title="') == 6
    assert "<i>↵</i><br></span>" in page
    assert "token 4, id" in page
    assert page.count('class="boundary"') == 1
