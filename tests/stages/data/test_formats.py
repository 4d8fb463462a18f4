"""Every format read as training rows; errors name the file and column of each row that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.base import UserError
from stages.data.formats import Conversation, Example, Pair, PlainText, Row, Tokens
from stages.data.reader import Reading, RowReport, dropped_rows_text, read_examples, read_pairs, row_place
from tests.stages.data.test_files import write

USER = {"role": "user", "content": "Sky?"}
BLUE = {"role": "assistant", "content": "blue"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look"}}


def read(path: Path, *rows: dict[str, Any], report: RowReport | None = None, **reading: Any) -> list[Row]:
    """Write `rows` to `path` and read them."""
    return [row for _, row in read_examples(write(path, list(rows)), Reading(**reading), report)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


WHITE = {"role": "assistant", "content": "white"}

# ----------------------------------------------------------------------------------------------------- formats

GOOD: dict[str, tuple[dict[str, Any], Row]] = {
    "prompt and completion": ({"prompt": "Sky?", "completion": "blue"}, Example("Sky?", "blue")),
    "prompt and completion as messages": (
        {"prompt": [USER], "completion": [BLUE], "tools": [TOOL]},
        Example([USER], [BLUE], tools=[TOOL]),
    ),
    "messages": ({"messages": [USER, BLUE, USER, BLUE]}, Conversation([USER, BLUE, USER, BLUE])),
    "messages and a prompt": ({"prompt": "Sky?", "messages": [USER, BLUE]}, Conversation([USER, BLUE])),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Sk"}, {"type": "text", "text": "y?"}]},
                BLUE,
            ]
        },
        Conversation([USER, BLUE]),
    ),
    "further keys of messages": (
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
            tools=[TOOL],
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
    "Alpaca with earlier exchanges": (
        {"instruction": "And now?", "output": "blue", "history": [["Sky?", "white"]]},
        Example([USER, WHITE, {"role": "user", "content": "And now?"}], [BLUE]),
    ),
    "arguments of the template": (
        {"messages": [USER, BLUE], "documents": [{"text": "x"}], "chat_template_kwargs": '{"mood": "calm"}'},
        Conversation([USER, BLUE], documents=[{"text": "x"}], chat_template_kwargs={"mood": "calm"}),
    ),
    "text": ({"text": "Once."}, PlainText("Once.")),
    "tokens": ({"input_ids": [0, 7], "loss_weights": [0, 0.5]}, Tokens([0, 7], [0, 0.5])),
}


@pytest.mark.parametrize("case", GOOD)
def test_the_format_is_detected_from_the_columns(path: Path, case: str) -> None:
    row, expected = GOOD[case]
    assert read(path, row) == [expected]


def test_column_names_of_the_trainers() -> None:
    assert Example("a", "b").columns() == {"prompt": "a", "completion": "b"}
    assert Conversation([BLUE], tools=[TOOL]).columns() == {"messages": [BLUE], "tools": [TOOL]}
    assert PlainText("a").columns() == {"text": "a"}
    assert Tokens([1], [0.5]).columns() == {"input_ids": [1], "loss_weights": [0.5]}
    assert Pair("a", "b", "c").columns() == {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_the_official_scripts_text_rule(path: Path) -> None:
    """One trailing space off the prompt, one space before the response, the EOS marker removed."""
    rows = [{"prompt": "Sky?  ", "response": "blue###eos_token###"}, {"prompt": "Snow?", "response": "white"}]
    assert read(path, *rows, format="official") == [Example("Sky? ", " blue"), Example("Snow?", " white")]


def test_limas_conversations_are_plain_texts(path: Path) -> None:
    """As messages, or by the official rule, which supports one exchange."""
    assert read(path, {"conversations": ["Sky?", "blue"], "source": "x"}) == [Conversation([USER, BLUE])]
    rows = [{"conversations": ["Sky? ", "blue"]}, {"conversations": [{"from": "human", "value": "a"}] * 2}]
    assert read(path, rows[0], format="official") == [Example("Sky?", " blue")]
    for turns in (["a", "b", "c", "d"], ["a"]):
        with pytest.raises(
            UserError, match=rf"'conversations' has {len(turns)} turns; format: official needs exactly one"
        ):
            read(path, {"conversations": turns}, format="official")
    with pytest.raises(UserError, match="format: official needs exactly one"):
        read(path, rows[1], format="official")


def test_complete_conversations_contain_their_prompt(path: Path) -> None:
    """With a separate text prompt, as in UltraFeedback, or without one, as in TRL."""
    row = {"chosen": [USER, BLUE], "rejected": [USER, WHITE]}
    for record in (row, {"prompt": "Sky?", **row}):
        assert list(read_pairs(write(path, [record]), Reading(), "column", 1)) == [(1, Pair([USER], [BLUE], [WHITE]))]
        official = read_pairs(write(path, [record]), Reading(format="official"), "column", 1)
        assert list(official) == [(1, Pair("Sky?", " blue", " white"))]
    longer = {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE, USER, WHITE]}
    assert next(read_pairs(write(path, [longer]), Reading(), "column", 1))[1] == Pair(
        [USER, BLUE, USER], [BLUE], [WHITE]
    )
    with pytest.raises(UserError, match="'chosen' has 4 turns; format: official needs exactly one"):
        list(read_pairs(write(path, [longer]), Reading(format="official"), "column", 1))
    text = {"prompt": "Sky? ", "chosen": "blue###eos_token###", "rejected": "white"}
    assert list(read_pairs(write(path, [text]), Reading(format="official"), "column", 1)) == [
        (1, Pair("Sky?", " blue", " white"))
    ]
    with pytest.raises(UserError, match="start with different messages"):
        list(read_pairs(write(path, [{"chosen": [USER, BLUE], "rejected": [WHITE, BLUE]}]), Reading(), "column", 1))


# ---------------------------------------------------------------------------------------------------- bad rows

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"prompt": "a"}, "column 'completion' is missing; the row has prompt"),
    "null": ({"prompt": "a", "completion": None}, "column 'completion' is missing; the row has prompt"),
    "messages that are text": (
        {"messages": "a"},
        "column 'messages' is text, but not JSON; write a list or object, or its JSON",
    ),
    "no message": ({"messages": []}, "column 'messages' is an empty list; fill it or remove the row"),
    "history that is no list of pairs": (
        {"instruction": "a", "output": "b", "history": [["Sky?"]]},
        "column 'history' is not a list of pairs [instruction, response]",
    ),
    "an argument of transformers": (
        {"messages": [USER, BLUE], "chat_template_kwargs": {"tokenize": True, "mood": "calm"}},
        "column 'chat_template_kwargs' sets tokenize, which this project sets itself",
    ),
    "template variables that are no object": (
        {"messages": [USER, BLUE], "chat_template_kwargs": [1]},
        "column 'chat_template_kwargs' is list, not an object of template variables",
    ),
    "no assistant": (
        {"messages": [USER]},
        "column 'messages' has no assistant message, so there is nothing to learn; remove the row",
    ),
    "role that is not text": (
        {"messages": [{"role": 3, "content": "a"}]},
        "column 'messages' has a message with the role 3; a role is text",
    ),
    "empty message": (
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        "column 'messages' has a message of the assistant that is empty; fill it or remove the row",
    ),
    "a call by the user": (
        {"messages": [{"role": "user", "tool_calls": [CALL]}, BLUE]},
        "column 'messages' has a message of the user that is empty; fill it or remove the row",
    ),
    "tool calls that are text": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": "look()"}]},
        "column 'messages' has 'look()' as tool_calls; write a list of objects",
    ),
    "content that is not text": (
        {"messages": [USER, {"role": "assistant", "content": 3}]},
        "column 'messages' has a message of the assistant whose content is int, not text",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, BLUE]},
        "column 'messages' has a message with a part of type 'image'; only text is supported",
    ),
    "negative weight": (
        {"messages": [USER, BLUE | {"weight": -1}]},
        "column 'messages' has the weight -1; a message's weight is a number >= 0",
    ),
    "weight that is not a number": (
        {"messages": [USER, BLUE | {"weight": True}]},
        "column 'messages' has the weight True; a message's weight is a number >= 0",
    ),
    "infinite weight": (
        {"messages": [USER, BLUE | {"weight": float("inf")}]},
        "not valid JSON: Infinity is not a finite number; write it as text, or remove it",
    ),
    "tools that are not JSON": (
        {"messages": [USER, BLUE], "tools": "look"},
        "column 'tools' is text, but not JSON; write a list or object, or its JSON",
    ),
    "half a surrogate pair": (
        {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        "column 'messages' has half a surrogate pair, which is not text; correct its \\u escapes",
    ),
    "unknown speaker": (
        {"conversations": [{"from": "bing", "value": "a"}]},
        "column 'conversations' has a turn from 'bing'; use one of system, human, user, gpt, assistant,"
        " function_call, tool, observation, function_response",
    ),
    "messages where turns belong": (
        {"conversations": [{"role": "user"}]},
        "column 'conversations' has {'role': 'user'}; a turn is an object with 'from' and 'value'"
        " (for 'role' and 'content' write columns: {messages: ...})",
    ),
    "two system messages": (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "column 'system' is a second system message; the conversation already has one; keep one of them",
    ),
    "lists of two lengths": (
        {"input_ids": [1, 2], "loss_weights": [1]},
        "has 2 input_ids but 1 loss_weights; write one weight for each token",
    ),
    "negative id": (
        {"input_ids": [1, -2], "loss_weights": [1, 1]},
        "column 'input_ids' has -2; a token id is an integer from 0 to 2147483647",
    ),
    "weight of a token": (
        {"input_ids": [1, 2], "loss_weights": [1, "1"]},
        "column 'loss_weights' has '1'; a weight is a finite number >= 0",
    ),
    "no format": (
        {"question": "a"},
        "columns question fit no format; rows need prompt and completion, or messages, or conversations, or"
        " instruction, input and output, or text, or input_ids and loss_weights; set data.columns to map other names",
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
    """A line that is not JSON, unknown columns before the format is detected, and an empty cell."""
    path.write_text('{"x": 1}\n{"text": "a"}\n{"te\n{"text": ""}\n{"text": "b"}\n')
    report = RowReport()
    rows = list(read_examples(path, Reading(on_bad_row="drop"), report))
    dropped = report.dropped
    assert rows == [(2, PlainText("a")), (5, PlainText("b"))]
    assert [line.split(": ")[0] for line in dropped] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert dropped[1].startswith(f"{path}:3: not valid JSON: ")
    assert (
        dropped_rows_text(dropped, path).splitlines()[2]
        == "a.jsonl:4: column 'text' is empty; fill it or remove the row"
    )


def test_columns_that_nothing_reads_are_listed(path: Path) -> None:
    """By the file's own names; a column of any row counts."""
    report = RowReport()
    rows = [{"q": "a", "completion": "b", "id": 1}, {"q": "a", "completion": "b", "score": 2, "id": 2}]
    read(path, *rows, report=report, columns={"prompt": "q"})
    assert report.unread_columns == ["id", "score"]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}]
    report = RowReport()
    assert list(read_pairs(write(path, pairs), Reading(), "column", 1, report))
    assert report.unread_columns == ["margin"]


def test_a_file_of_bad_rows_alone_is_an_error(path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: column 'text' is empty"):
        read(path, {"text": ""}, {"text": ""}, on_bad_row="drop")


def test_text_and_messages_do_not_mix(path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [BLUE]}]
    with pytest.raises(UserError, match=r"a\.jsonl:2: some rows are plain text and others are messages; put each"):
        read(path, *rows)


# ----------------------------------------------------------------------------------------------------- columns


def test_columns_are_renamed_before_the_format_is_detected(path: Path) -> None:
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
    report = RowReport()
    drop = Reading(columns={"chosen": "good"}, on_bad_row="drop")
    rows.append({"prompt": "a", "good": "b", "rejected": "c"})
    assert list(read_pairs(write(path, rows), drop, "column", 1, report)) == [(3, Pair("a", "b", "c"))]
    assert report.dropped == [
        f"{path}:1: column 'good' is missing; the row has prompt, chosen, rejected",
        f"{path}:2: chosen and rejected are the same; remove the row",
    ]


def test_pairs_of_other_rows(path: Path) -> None:
    """Chosen is the row's completion; rejected is a different one of another row, drawn by the seed."""
    rows = [{"prompt": f"{i}?", "completion": str(i % 3)} for i in range(30)]
    write(path, rows)

    def pairs(seed: int) -> list[Pair]:
        return [pair for _, pair in read_pairs(path, Reading(), "other_row", seed)]

    assert [(pair.prompt, pair.chosen) for pair in pairs(1)] == [(row["prompt"], row["completion"]) for row in rows]
    assert all(pair.rejected in {"0", "1", "2"} - {pair.chosen} for pair in pairs(1))
    assert pairs(1) == pairs(1)
    assert pairs(1) != pairs(2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "needs rows with different completions"),
        ({"messages": [USER, BLUE]}, "other_row needs rows of prompt and completion, or of alpaca's columns"),
    ],
)
def test_rows_that_make_no_pairs(path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_pairs(write(path, [row] * 2), Reading(), "other_row", seed=1))


def test_a_folder_is_read_as_one_split(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": " "}])
    write(tmp_path / "set" / "test.jsonl", [{"text": "two"}])
    assert list(read_examples(tmp_path / "set", Reading(split="test"))) == [(1, PlainText("two"))]
    with pytest.raises(UserError, match=r"set/train\.jsonl:2: column 'text' is empty"):
        list(read_examples(tmp_path / "set", Reading()))
    write(tmp_path / "set" / "train_2.jsonl", [{"text": "three"}])
    places = row_place(tmp_path / "set", Reading())
    assert [places(number) for number in (1, 3)] == [
        str(tmp_path / "set" / name) for name in ("train.jsonl:1", "train_2.jsonl:1")
    ]


def test_rows_come_one_by_one(path: Path) -> None:
    """The first row is available before the last, which is bad, is read."""
    rows = read_examples(write(path, [{"text": "one"}, {"text": ""}]), Reading())
    assert next(rows) == (1, PlainText("one"))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        next(rows)
