"""The same rows in every type of file, alone and in folders: equal rows, equal tokens and equal losses."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stages.base import Context, Input, UserError
from stages.data.dataset_cache import load_rows
from stages.data.formats import Conversation, Example, Pair
from stages.data.reader import Reading, RowReport, read_examples, read_pairs
from stages.data.tokenization import Preparer
from stages.sft.config import SFTStage
from stages.sft.stage import run
from tests.tiny import byte_tokenizer

Rows = list[dict[str, Any]]

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}</end>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ODD = "NA None null nan 007 1e5 5 true 2020-01-31 2020-01-31T10:00:00Z [] {} [1] a,b é 語 🙂 ' ; \" \\"
WORDS = st.sampled_from([*ODD.split(), "", " ", "tab\t", "two\nlines", "a\r\nb", 'say "hi"', "\u2028"])
TEXT = st.lists(st.one_of(WORDS, st.text(max_size=4)), min_size=1, max_size=3).map("".join).filter(str.strip)
SCALAR = st.one_of(TEXT, st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUE = st.one_of(SCALAR, st.lists(st.one_of(st.none(), SCALAR), max_size=2), st.dictionaries(TEXT, SCALAR, max_size=2))
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "unit", "days"]), VALUE, max_size=3)


@st.composite
def conversation(draw: Any) -> dict[str, Any]:
    """A row of messages, with tools whose keys and types differ from row to row."""
    row: dict[str, Any] = {"messages": [{"role": "user", "content": draw(TEXT)}]}
    if draw(st.booleans()):
        call = {"type": "function", "function": {"name": draw(TEXT), "arguments": draw(ARGUMENTS)}}
        row["messages"].append({"role": "assistant", "tool_calls": [call]})
        row["messages"].append({"role": "tool", "content": draw(TEXT), "name": "f"})
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": draw(ARGUMENTS)}}]
    row["messages"].append({"role": "assistant", "content": draw(TEXT)})
    return row


EXAMPLE = st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT})
CHAT_EXAMPLE = conversation().map(
    lambda row: {**row, "prompt": row["messages"][:-1], "completion": row["messages"][-1:], "messages": None}
)
PAIR = st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT.map("y".__add__), "rejected": TEXT.map("n".__add__)})


def rows_of(row: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Rows]:
    rows = st.lists(row, min_size=1, max_size=4)
    return rows.map(lambda rows: [{k: v for k, v in row.items() if v is not None} for row in rows])


def with_null_keys(value: Any) -> Any:
    """The value with one more key, which is null, in every object."""
    if isinstance(value, dict):
        return {name: with_null_keys(part) for name, part in value.items()} | {"other": None}
    return [with_null_keys(part) for part in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in type and content, apart from the order of keys and keys that are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in sorted(value.items()) if part is not None}
        return [plain(part) for part in value] if isinstance(value, list) else value

    return repr(plain(one)) == repr(plain(other))


def json_table(rows: Rows) -> pyarrow.Table:
    """A table whose lists and objects have the type of datasets' feature Json, which can hold any."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if all(isinstance(value, str | None) for value in values):
            columns[name] = pyarrow.array(values, pyarrow.string())
        else:
            encoded = [None if value is None else json.dumps(value) for value in values]
            storage = pyarrow.array(encoded, pyarrow.string())
            columns[name] = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), storage)
    return pyarrow.table(columns)


def tables(rows: Rows) -> Iterator[tuple[str, pyarrow.Table]]:
    """Tables that hold the rows: of JSON, and of Arrow's own types if those can hold them."""
    yield "json", json_table(rows)
    try:
        nested = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(nested, io.BytesIO())
    except (pyarrow.ArrowException, OverflowError):  # mixed types, integers beyond 64 bits, objects without keys
        return
    if all(same(*pair) for pair in zip(nested.to_pylist(), rows, strict=True)):
        yield "nested", nested


def csv_cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def write_all(rows: Rows, folder: Path) -> list[Path]:
    """Write the rows in every type of file, and one folder for each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    texts = {
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "unicode.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in with_null_keys(rows)),
        "list.json": json.dumps(rows, indent=1),
        "lines.json": "".join(json.dumps(row) + "\n" for row in rows),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    with (folder / "cells.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    saved = []
    for name, table in tables(rows):
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
        for kind, writer in {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}.items():
            with writer(folder / f"{name}-{kind}.arrow", table.schema) as sink:
                sink.write_table(table)
        dataset = datasets.Dataset(table)
        dataset.save_to_disk(folder / f"{name}-saved")
        datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(folder / f"{name}-splits")
        saved += [folder / f"{name}-saved", folder / f"{name}-splits"]
    files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        alone = folder / f"folder of {file.name}"
        alone.mkdir()
        shutil.copy(file, alone / f"train{file.suffix}")
        saved.append(alone)
    return files + saved


def test_every_path_is_compared(tmp_path: Path) -> None:
    """Rows that Arrow can hold are written in 4 texts, CSV, 2 x 3 binary files; a folder each; 2 x 2 saved."""
    assert len(write_all([{"prompt": "a", "completion": "b"}], tmp_path / "rows")) == 11 * 2 + 4


QUIET = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(st.one_of(rows_of(EXAMPLE), rows_of(CHAT_EXAMPLE), rows_of(conversation())))
def test_examples_are_the_rows_as_they_were_written(tmp_path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    for path in write_all(rows, tmp_path / "rows"):
        report = RowReport()
        examples = [example.columns() for _, example in read_examples(path, Reading(), report)]
        assert len(examples) == len(rows)
        assert all(same(*pair) for pair in zip(examples, rows, strict=True)), path
        assert report == RowReport(unread_columns=[]), path


@settings(QUIET, max_examples=4)
@given(rows_of(PAIR))
def test_pairs_are_the_rows_as_they_were_written(tmp_path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    for path in write_all(rows, tmp_path / "rows"):
        assert [pair for _, pair in read_pairs(path, Reading(), "column", 1)] == [Pair(**row) for row in rows], path


# ----------------------------------------------------------------------------------------- tokens and training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tiny model with TEMPLATE."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def context(path: Path, model: Path, folder: Path, **train: Any) -> Context:
    """The context of an sft step that reads `path`."""
    section = {"data": {"train": path.name}, "weights": {"prompt": 0.5, "completion": 1}, "train": train}
    inputs = {"model": Input(model), "train": Input(path, fingerprint=str(path))}
    places = [folder / name for name in ("out", "scratch", "checkpoints", "cache")]
    shutil.rmtree(folder, ignore_errors=True)
    for place in places:
        place.mkdir(parents=True)
    return Context("same", "wit", SFTStage(**section), inputs, *places, lambda *_: None)


NUMBERS = {"function": {"name": "f", "arguments": {"days": [7.56, 0.1 + 0.2, 1e22, 2**70, None], "city": "NA"}}}


@settings(QUIET, max_examples=3)
@example([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [NUMBERS]}]}])
@given(rows_of(conversation()))
def test_tokens_are_those_of_the_template_on_the_rows(tmp_path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    texts = [tokenizer.apply_chat_template(row["messages"], row.get("tools"), tokenize=False) for row in rows]
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for path in write_all(rows, tmp_path / "rows"):
        prepared, _ = load_rows(context(path, tmp_path, tmp_path / "step"), "train", Preparer(tokenizer, None))
        if "nested" not in str(path):  # Arrow orders the keys of objects alike in all rows
            assert prepared["input_ids"][:] == expected, path
        assert [sorted(ids) for ids in prepared["input_ids"]] == [sorted(ids) for ids in expected], path


@pytest.mark.long
def test_the_loss_of_a_step_is_the_same(tmp_path: Path, model: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "NA", "days": 7.56}}}
    other = {"type": "function", "function": {"name": "f", "arguments": {"code": "007"}}}
    rows: Rows = [
        {
            "messages": [
                {"role": "user", "content": "Who, or what?"},
                {"role": "assistant", "tool_calls": [tool_call]},
                {"role": "tool", "content": "2020-01-31"},
                {"role": "assistant", "content": "None"},
            ]
        }
        for tool_call in (call, other)
    ]
    losses = {}
    paths = write_all(rows, tmp_path / "rows")
    for path in (path for path in paths if path.is_file() or "saved" in path.name or "cells" in path.name):
        step = context(path, model, tmp_path / "step", max_steps=1, logging_steps=1, use_cpu=True)
        run(step)
        losses[path] = json.loads((step.out / "training_log.jsonl").read_text().splitlines()[0])["loss"]
    assert len(losses) == 11 + 3
    assert len(set(losses.values())) == 1, losses


# ------------------------------------------------------------------------------------------------- Arrow's types


def test_nullable_types_of_pandas(tmp_path: Path) -> None:
    """A missing value is a missing column, whatever type pandas gives the column."""
    frame = pandas.DataFrame({"prompt": ["NA", "007"], "completion": ["1", "<NA>"], "system": [None, "Be brief."]})
    frame["prompt"] = frame["prompt"].astype("category")
    for number, table in enumerate((frame, frame.convert_dtypes(), frame.convert_dtypes(dtype_backend="pyarrow"))):
        table.to_parquet(tmp_path / f"{number}.parquet")
        rows = [row for _, row in read_examples(tmp_path / f"{number}.parquet", Reading())]
        assert rows == [Example("NA", "1"), Example("007", "<NA>")]


def test_a_map_is_an_object(tmp_path: Path) -> None:
    pairs = pyarrow.map_(pyarrow.string(), pyarrow.string())
    messages = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    turns = [[("role", "user"), ("content", "a"), ("name", None)], [("role", "assistant"), ("content", "b")]]
    options = [[("thinking", "off"), ("other", None)]]
    table = pyarrow.table(
        {"messages": pyarrow.array([turns], messages), "chat_template_kwargs": pyarrow.array(options, pairs)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [row for _, row in read_examples(tmp_path / "a.parquet", Reading())]
    assert rows == [Conversation(chat, chat_template_kwargs={"thinking": "off"})]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([pandas.Timestamp(2020, 1, 31)], r"is datetime, not text"),
        ([b"a"], r"is bytes, not text"),
        ([1.0], r"is float, not text"),
        ([[{"role": "assistant", "content": "a", "at": pandas.Timestamp(2020, 1, 31)}]], r"datetime is not JSON"),
    ],
)
def test_values_that_json_has_not(tmp_path: Path, values: list[Any], reason: str) -> None:
    """An error, but in a column that nothing reads."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"], "other": values}), path)
    assert [row for _, row in read_examples(path, Reading())] == [Example("a", "b")]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": values}), path)
    with pytest.raises(UserError, match=rf"a\.parquet:1: column 'completion' .*{reason}"):
        list(read_examples(path, Reading()))


def test_text_that_is_the_json_of_messages_in_one_column_only_is_text(tmp_path: Path) -> None:
    """An answer can be JSON; prompt and completion are messages if both are."""
    chat = json.dumps([{"role": "user", "content": "a"}])
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Write JSON.", "completion": chat}))
    assert [row for _, row in read_examples(tmp_path / "a.jsonl", Reading())] == [Example("Write JSON.", chat)]


def test_optional_columns_may_have_another_name(tmp_path: Path) -> None:
    """A row may lack them; a name that no row has is an error."""
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "sys": "Be brief."}]
    for path in write_all(rows, tmp_path / "rows"):
        examples = [row for _, row in read_examples(path, Reading(columns={"system": "sys"}))]
        assert [len(example.prompt) for example in examples if isinstance(example, Example)] == [1, 2]
        with pytest.raises(UserError, match=r"no row has the column system_prompt; correct data\.columns"):
            list(read_examples(path, Reading(columns={"system": "system_prompt"})))
