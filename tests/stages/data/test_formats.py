"""Columns in every format, read as training rows; the file and the column of every row that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.base import UserError
from stages.data.formats import Conversation, Example, Pair, PlainText, Row, Tokens
from stages.data.reader import Reading, listing, read_examples, read_pairs
from tests.stages.data.test_files import write

USER = {"role": "user", "content": "Sky?"}
BLUE = {"role": "assistant", "content": "blue"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look"}}


def read(path: Path, *rows: dict[str, Any], dropped: list[str] | None = None, **reading: Any) -> list[Row]:
    """What `rows`, written to `path`, are read as."""
    return [row for _, row in read_examples(write(path, list(rows)), Reading(**reading), dropped)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


# ----------------------------------------------------------------------------------------------------- formats

GOOD: dict[str, tuple[dict[str, Any], Row]] = {
    "prompt and completion": ({"prompt": "Sky?", "completion": "blue"}, Example("Sky?", "blue")),
    "prompt and completion as messages": (
        {"prompt": [USER], "completion": [BLUE], "tools": [TOOL]},
        Example([USER], [BLUE], [TOOL]),
    ),
    "messages": ({"messages": [USER, BLUE, USER, BLUE]}, Conversation([USER, BLUE, USER, BLUE])),
    "messages beside a prompt": ({"prompt": "Sky?", "messages": [USER, BLUE]}, Conversation([USER, BLUE])),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?"}]},
                BLUE,
            ]
        },
        Conversation([USER, BLUE]),
    ),
    "what messages carry": (
        {"messages": [USER | {"name": "Ann"}, BLUE | {"weight": 0.5, "thinking": None}]},
        Conversation([USER | {"name": "Ann"}, BLUE | {"weight": 0.5}]),
    ),
    "calls of tools": (
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "blue"}, BLUE],
            "tools": json.dumps([TOOL]),
        },
        Conversation(
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "blue"},
                BLUE,
            ],
            [TOOL],
        ),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "Sky?"},
                {"from": "function_call", "value": "look()"},
                {"from": "observation", "value": "blue"},
                {"from": "gpt", "value": "blue", "weight": 0},
            ],
            "system": "Be brief.",
            "tools": "",
        },
        Conversation(
            [
                {"role": "system", "content": "Be brief."},
                USER,
                {"role": "assistant", "content": "look()"},
                {"role": "tool", "content": "blue"},
                BLUE | {"weight": 0},
            ]
        ),
    ),
    "Alpaca": (
        {"instruction": "Add them.", "input": "1, 2", "output": "3"},
        Example([{"role": "user", "content": "Add them.\n\n1, 2"}], [{"role": "assistant", "content": "3"}]),
    ),
    "Alpaca without input": (
        {"instruction": "Sky?", "input": "", "output": "blue", "system": ""},
        Example([USER], [BLUE]),
    ),
    "Alpaca with a system message": (
        {"instruction": "Sky?", "output": "blue", "system": "Be brief."},
        Example([{"role": "system", "content": "Be brief."}, USER], [BLUE]),
    ),
    "text": ({"text": "Once."}, PlainText("Once.")),
    "tokens": ({"input_ids": [0, 7], "loss_weights": [0, 0.5]}, Tokens([0, 7], [0, 0.5])),
}


@pytest.mark.parametrize("case", GOOD)
def test_the_columns_tell_the_format(path: Path, case: str) -> None:
    row, expected = GOOD[case]
    assert read(path, row) == [expected]


def test_the_names_that_trainers_read() -> None:
    assert Example("a", "b").columns() == {"prompt": "a", "completion": "b"}
    assert Conversation([BLUE], [TOOL]).columns() == {"messages": [BLUE], "tools": [TOOL]}
    assert PlainText("a").columns() == {"text": "a"}
    assert Tokens([1], [0.5]).columns() == {"input_ids": [1], "loss_weights": [0.5]}
    assert Pair("a", "b", "c").columns() == {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_the_official_scripts_text_rule(path: Path) -> None:
    """One trailing space off the prompt, one space before the response, the marker stands for EOS."""
    rows = [{"prompt": "Sky?  ", "response": "blue###eos_token###"}, {"prompt": "Snow?", "response": "white"}]
    assert read(path, *rows, format="official") == [Example("Sky? ", " blue"), Example("Snow?", " white")]


def test_limas_conversations_are_mere_texts(path: Path) -> None:
    """As messages, or by the official rule, which knows one exchange."""
    assert read(path, {"conversations": ["Sky?", "blue"], "source": "x"}) == [Conversation([USER, BLUE])]
    rows = [{"conversations": ["Sky? ", "blue"]}, {"conversations": [{"from": "human", "value": "a"}] * 2}]
    assert read(path, rows[0], format="official") == [Example("Sky?", " blue")]
    for turns in (["a", "b", "c", "d"], ["a"]):
        with pytest.raises(UserError, match=rf"'conversations' holds {len(turns)} turns; the official rule knows one"):
            read(path, {"conversations": turns}, format="official")
    with pytest.raises(UserError, match="the official rule knows one"):
        read(path, rows[1], format="official")


WHITE = {"role": "assistant", "content": "white"}


def test_whole_conversations_hold_their_prompt(path: Path) -> None:
    """As UltraFeedback's, whose prompt is beside them as text, and as TRL's, which have none beside them."""
    row = {"chosen": [USER, BLUE], "rejected": [USER, WHITE]}
    for given in (row, {"prompt": "Sky?", **row}):
        assert list(read_pairs(write(path, [given]), Reading(), "column", 1)) == [(1, Pair([USER], [BLUE], [WHITE]))]
        official = read_pairs(write(path, [given]), Reading(format="official"), "column", 1)
        assert list(official) == [(1, Pair("Sky?", " blue", " white"))]
    longer = {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE, USER, WHITE]}
    assert next(read_pairs(write(path, [longer]), Reading(), "column", 1))[1] == Pair(
        [USER, BLUE, USER], [BLUE], [WHITE]
    )
    with pytest.raises(UserError, match="'chosen' holds 4 turns; the official rule knows one"):
        list(read_pairs(write(path, [longer]), Reading(format="official"), "column", 1))
    text = {"prompt": "Sky? ", "chosen": "blue###eos_token###", "rejected": "white"}
    assert list(read_pairs(write(path, [text]), Reading(format="official"), "column", 1)) == [
        (1, Pair("Sky?", " blue", " white"))
    ]
    with pytest.raises(UserError, match="begin with different messages"):
        list(read_pairs(write(path, [{"chosen": [USER, BLUE], "rejected": [WHITE, BLUE]}]), Reading(), "column", 1))


# ---------------------------------------------------------------------------------------------------- bad rows

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"prompt": "a"}, "column 'completion' is missing; the row has prompt"),
    "null": ({"prompt": "a", "completion": None}, "column 'completion' is empty; fill it or remove the row"),
    "messages that are none": ({"messages": "a"}, "column 'messages' is str, not a list"),
    "no message": ({"messages": []}, "column 'messages' is an empty list; fill it or remove the row"),
    "no assistant": (
        {"messages": [USER]},
        "column 'messages' holds no assistant message, so there is nothing to learn; remove the row",
    ),
    "role that is no text": (
        {"messages": [{"role": 3, "content": "a"}]},
        "column 'messages' holds a message with the role 3; a role is text",
    ),
    "empty message": (
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        "column 'messages' holds a message of the assistant that is empty; fill it or remove the row",
    ),
    "a call by the user": (
        {"messages": [{"role": "user", "tool_calls": [CALL]}, BLUE]},
        "column 'messages' holds a message of the user that is empty; fill it or remove the row",
    ),
    "calls that are none": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": "look()"}]},
        "column 'messages' holds 'look()' as tool_calls; give a list of objects",
    ),
    "content that is no text": (
        {"messages": [USER, {"role": "assistant", "content": 3}]},
        "column 'messages' holds a message of the assistant whose content is int, not text",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, BLUE]},
        "column 'messages' holds a message with a part of type 'image'; content is only text",
    ),
    "negative weight": (
        {"messages": [USER, BLUE | {"weight": -1}]},
        "column 'messages' holds the weight -1; a message's weight is a number >= 0",
    ),
    "weight that is no number": (
        {"messages": [USER, BLUE | {"weight": True}]},
        "column 'messages' holds the weight True; a message's weight is a number >= 0",
    ),
    "infinite weight": (
        {"messages": [USER, BLUE | {"weight": float("inf")}]},
        "column 'messages' holds the weight inf; a message's weight is a number >= 0",
    ),
    "tools that are no JSON": (
        {"messages": [USER, BLUE], "tools": "look"},
        "column 'tools' is text, but no JSON; give a list of objects, or its JSON",
    ),
    "half a surrogate pair": (
        {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        "column 'messages' holds half a surrogate pair, which is no text; mend its \\u escapes",
    ),
    "unknown speaker": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "column 'conversations' holds a turn from 'bing'; known are system, human, user, gpt, assistant,"
        " function_call, tool, observation, function_response",
    ),
    "messages where turns belong": (
        {"conversations": [{"role": "user"}]},
        "column 'conversations' holds {'role': 'user'}; a turn is an object with 'from' and 'value'"
        " (for 'role' and 'content' write columns: {messages: ...})",
    ),
    "two system messages": (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "column 'system' is a second system message beside the conversation's own; keep one of them",
    ),
    "lists of two lengths": (
        {"input_ids": [1, 2], "loss_weights": [1]},
        "input_ids has 2 items and loss_weights 1; give every token a weight",
    ),
    "negative id": (
        {"input_ids": [1, -2], "loss_weights": [1, 1]},
        "column 'input_ids' holds -2, which is no token id, a whole number >= 0",
    ),
    "weight of a token": (
        {"input_ids": [1, 2], "loss_weights": [1, "1"]},
        "column 'loss_weights' holds '1', which is no weight, a number >= 0",
    ),
    "no format": (
        {"question": "a"},
        "columns question fit no format; give prompt and completion, or messages, or conversations, or instruction,"
        " input and output, or text, or input_ids and loss_weights, or map the file's with columns",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_reason(path: Path, case: str) -> None:
    row, reason = BAD[case]
    with pytest.raises(UserError) as caught:
        read(path, row)
    assert str(caught.value) == f"{path}:1: {reason}"


def test_many_bad_rows_are_listed_and_counted(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(path, {"prompt": "a", "completion": "b"}, *[{"prompt": "x"}] * 15)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}:2: column 'completion' is missing")
    assert len(lines) == 11
    assert lines[-1] == "and 5 more rows like these"


def test_bad_rows_are_dropped_and_listed(path: Path) -> None:
    """A line that is no JSON, a row of unknown columns before the format is known, and an empty cell."""
    path.write_text('{"x": 1}\n{"text": "a"}\n{"te\n{"text": ""}\n{"text": "b"}\n')
    dropped: list[str] = []
    rows = list(read_examples(path, Reading(on_bad_row="drop"), dropped))
    assert rows == [(2, PlainText("a")), (5, PlainText("b"))]
    assert [told.split(": ")[0] for told in dropped] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert dropped[1].startswith(f"{path}:3: not valid JSON: ")
    assert listing(dropped, [path]).splitlines()[2] == "a.jsonl:4: column 'text' is empty; fill it or remove the row"


def test_a_file_of_bad_rows_alone_is_an_error(path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: column 'text' is empty"):
        read(path, {"text": ""}, {"text": ""}, on_bad_row="drop")


def test_text_and_messages_do_not_mix(path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [BLUE]}]
    with pytest.raises(UserError, match=r"a\.jsonl:2: some rows are plain text and others are messages; keep each"):
        read(path, *rows)


# ----------------------------------------------------------------------------------------------------- columns


def test_columns_are_renamed_before_the_format_is_told(path: Path) -> None:
    row = {"question": "Sky?", "answer": "blue", "text": "Sky? blue"}
    assert read(path, row, columns={"prompt": "question", "completion": "answer"}) == [Example("Sky?", "blue")]
    assert read(path, row, columns={"prompt": "text", "completion": "text"}) == [Example("Sky? blue", "Sky? blue")]
    swapped = {"prompt": "blue", "completion": "Sky?"}
    assert read(path, swapped, columns={"prompt": "completion", "completion": "prompt"}) == [Example("Sky?", "blue")]
    assert read(path, {"conversations": [USER, BLUE]}, columns={"messages": "conversations"}) == [
        Conversation([USER, BLUE])
    ]


def test_errors_name_the_files_own_column(path: Path) -> None:
    names = {"prompt": "question", "completion": "answer"}
    with pytest.raises(UserError, match=r"a\.jsonl:1: column 'answer' is missing; the row has question$"):
        read(path, {"question": "a"}, columns=names)
    with pytest.raises(UserError, match=r"a\.jsonl:1: column 'answer' is int, not text$"):
        read(path, {"question": "a", "answer": 3}, columns=names)


# ------------------------------------------------------------------------------------------------------- pairs


def test_pairs(path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "good": "b", "rejected": "b"}]
    with pytest.raises(
        UserError, match=r"^\S+a\.jsonl:2: column 'chosen' is missing; the row has prompt, good, rejected$"
    ):
        list(read_pairs(write(path, rows), Reading(), "column", seed=1))
    dropped: list[str] = []
    drop = Reading(columns={"chosen": "good"}, on_bad_row="drop")
    rows.append({"prompt": "a", "good": "b", "rejected": "c"})
    assert list(read_pairs(write(path, rows), drop, "column", 1, dropped)) == [(3, Pair("a", "b", "c"))]
    assert dropped == [
        f"{path}:1: column 'good' is missing; the row has prompt, chosen, rejected",
        f"{path}:2: chosen and rejected are the same, so the pair prefers nothing; remove it",
    ]


def test_pairs_of_other_rows(path: Path) -> None:
    """Chosen is the row's own completion; rejected is another row's and never the same text; the seed decides."""
    rows = [{"prompt": f"{i}?", "completion": str(i % 3)} for i in range(30)]
    write(path, rows)

    def pairs(seed: int) -> list[Pair]:
        return [pair for _, pair in read_pairs(path, Reading(), "other_row", seed)]

    assert [(pair.prompt, pair.chosen) for pair in pairs(1)] == [(row["prompt"], row["completion"]) for row in rows]
    assert all(pair.rejected in {"0", "1", "2"} - {pair.chosen} for pair in pairs(1))
    assert pairs(1) == pairs(1)
    assert pairs(1) != pairs(2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b"}, "needs rows with different completions"),
        ({"messages": [USER, BLUE]}, "other_row needs rows of prompt and completion, or of alpaca's columns"),
    ],
)
def test_rows_that_make_no_pairs(path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        list(read_pairs(write(path, [row] * 2), Reading(), "other_row", seed=1))


def test_a_folder_is_read_as_one_split(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": " "}])
    write(tmp_path / "set" / "test.jsonl", [{"text": "two"}])
    assert list(read_examples(tmp_path / "set", Reading(split="test"))) == [(1, PlainText("two"))]
    with pytest.raises(UserError, match=r"set\[train\]:2: column 'text' is empty"):
        list(read_examples(tmp_path / "set", Reading()))


def test_rows_come_one_by_one(path: Path) -> None:
    """The first row is there before the last, which is bad, was looked at."""
    rows = read_examples(write(path, [{"text": "one"}, {"text": ""}]), Reading())
    assert next(rows) == (1, PlainText("one"))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        next(rows)
