"""Data files of every type and data set folders, read as records."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from stages.base import UserError
from stages.data.files import BadRow, read_file, read_rows
from stages.data.folders import read_folder
from stages.data.reader import Reading, RowReport, read_examples, report_notes

ROWS = [{"prompt": "Sky?", "completion": "blue, or grey"}, {"prompt": "Snow?", "completion": "white"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write `rows` to a file of the type that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_type_of_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', [1, 3]),
        ("a.json", '[{"a": 1},\n\n{"a": 2}]\n', [1, 2]),
        ("a.json", '\n{"a": 1}\n\n{"a": 2}\n', [2, 4]),
        ("a.csv", 'a\n"1\n1"\n\n2\n', [2, 5]),
    ],
)
def test_numbers_are_lines_where_rows_are_lines(tmp_path: Path, name: str, text: str, numbers: list[int]) -> None:
    assert [number for number, _ in read_rows(lines(tmp_path / name, text))] == numbers


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a\.txt: unknown type of data file; use \.jsonl"),
        ("a.jsonl", "\n", r"a\.jsonl: has no rows"),
        ("a.json", "[]", r"a\.json: has no rows"),
        ("a.csv", "a,b\n", r"a\.csv: has no rows"),
        ("a.json", '{"rows": [\n{"a": 2}]}\n', r"a\.json: .* one list of rows, or have one object per line"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json:2: not valid JSON: Expecting value"),
        ("a.json", '[{"a": 1}\n {"a": 1}]', r"a\.json:2: not valid JSON: Expecting ',' or '\]'"),
        ("a.json", '[{"a": 1},\n {"a": 1, "a": 2}]', r"a\.json:2: not valid JSON: an object has the key 'a' twice"),
        ("a.json", '[{"a": 1},\n {"a": 1e400}]', r"a\.json:2: not valid JSON: 1e400 is not a finite number"),
        ("a.json", '[{"a": NaN}]', r"a\.json:1: not valid JSON: NaN is not a finite number"),
        ("a.json", "[" * 100_000, r"a\.json:1: not valid JSON: maximum recursion depth"),
        ("a.json", '[{"a": 1},]', r"a\.json:1: not valid JSON"),
        ("a.json", '[{"a": 1}', r"a\.json:1: not valid JSON"),
        ("a.json", '[{"a": 1}]\n]', r"a\.json:2: not valid JSON: Extra data"),
        ("a.parquet", "nonsense", r"a\.parquet: is not a valid \.parquet file"),
        ("a.arrow", "nonsense", r"a\.arrow: is not a valid \.arrow file"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: two columns have the name 'a'"),
        ("a.csv", "\na,,b\n1,2,3\n", r"a\.csv:2: a column has no name"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv:2: in the row that starts here, a quoted cell is not closed"),
        ("a.csv", 'a,b\n1,2\n"3\n\n",4\n5,"6\n7,"8"\n', r"a\.csv:6: in the row that starts here"),
        ("a.csv", 'a,b\r\n"1\r\n",",\r\n3,"4"\r\n', r"a\.csv:2: in the row that starts here"),
        ("a.csv", 'a,b\n1,"say \\"hi\\""\n', r"a\.csv:2: in the row that starts here"),
    ],
)
def test_errors_of_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_file(lines(tmp_path / name, text)))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 1, "a": 1}\n{"a": 2}\n',
            "not valid JSON: an object has the key 'a' twice; remove one",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": [-Infinity]}\n{"a": 2}\n',
            "not valid JSON: -Infinity is not a finite number; write it as text, or remove it",
        ),
        ("a.jsonl", '{"a": 1}\n{"a"\n{"a": 2}\n', "not valid JSON: Expecting ':' delimiter; write one object per line"),
        ("a.jsonl", '{"a": 1}\n["a"]\n{"a": 2}\n', "is list, not an object with named columns"),
        ("a.json", '[{"a": 1}, 3, {"a": 2}]', "is int, not an object with named columns"),
        ("a.csv", "a\n1\n1,2\n2\n", "has 2 cells, but the header has 1; quote cells that contain commas"),
        ("a.csv", "a,b\n1,1\n1\n2,2\n", "has 1 cells, but the header has 2; quote cells that contain commas"),
    ],
)
def test_a_row_that_cannot_be_read_between_others(tmp_path: Path, name: str, text: str, reason: str) -> None:
    path = lines(tmp_path / name, text)
    first, bad, last = (row for _, row in read_file(path))
    assert isinstance(bad, BadRow)
    assert (isinstance(first, dict), str(bad), isinstance(last, dict)) == (True, reason, True)
    with pytest.raises(UserError, match=rf"{name}:\d: "):
        list(read_rows(path))


def test_a_line_nested_too_deep_is_one_bad_row(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 900 + "]" * 900 + "}"
    path = lines(tmp_path / "a.jsonl", "[" * 100_000 + f'\n{deep}\n{{"a": 1}}\n')
    (_, bad), (_, too_deep), good = read_file(path)
    assert isinstance(bad, BadRow)
    assert "not valid JSON: maximum recursion depth" in bad.reason
    assert str(too_deep) == "is nested too deep"
    assert good == (3, {"a": 1})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_memory_holds_a_few_rows_at_a_time(tmp_path: Path, suffix: str) -> None:
    """50,000 rows of 200 letters are 10 MB; reading them one by one takes less than a tenth."""
    path = write(tmp_path / f"a{suffix}", [{"text": f"{number:0200}"} for number in range(50_000)])
    assert next(iter(read_file(path)))  # imports the libraries
    tracemalloc.start()
    count = sum(1 for _ in read_file(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 50_000
    assert peak < 1_000_000


def test_the_first_row_needs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 10_000 + b"\xff\n")
    rows = read_file(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UserError, match="is not UTF-8"):
        list(rows)


# ----------------------------------------------------------------------------------------------------- folders

CARD = """\
---
configs:
- config_name: easy
  data_files: [{split: train, path: easy/*.jsonl}]
- config_name: hard
  data_files: [{split: train, path: hard/rows.jsonl}, {split: held, path: hard/held.jsonl}]
---
"""


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    """A folder as on the hub: Parquet files named after their splits."""
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", [{"text": "one"}, {"text": "two"}])
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", [{"text": "three"}])
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", [{"text": "four"}])
    return tmp_path / "set"


@pytest.fixture
def two_subsets(tmp_path: Path) -> Path:
    """A folder whose card defines subsets."""
    write(tmp_path / "set" / "easy" / "rows.jsonl", [{"text": "one"}])
    write(tmp_path / "set" / "hard" / "rows.jsonl", [{"text": "two"}])
    write(tmp_path / "set" / "hard" / "held.jsonl", [{"text": "three"}])
    return lines(tmp_path / "set" / "README.md", CARD).parent


def rows_of(folder: Path, subset: str | None, split: str) -> list[Any]:
    return [row for _, _, row in read_folder(folder, subset, split)]


def test_the_splits_of_a_folder(two_splits: Path) -> None:
    first, second = (two_splits / "data" / f"train-0000{i}-of-00002.parquet" for i in range(2))
    assert list(read_folder(two_splits, None, "train")) == [
        (first, 1, {"text": "one"}),
        (first, 2, {"text": "two"}),
        (second, 1, {"text": "three"}),
    ]
    assert rows_of(two_splits, None, "test") == [{"text": "four"}]
    with pytest.raises(UserError, match=r"has no split 'validation'; .*data\.train_split.*: train, test"):
        list(read_folder(two_splits, None, "validation"))
    with pytest.raises(UserError, match=r"has no subset 'easy'; set data\.subset to one of: default"):
        list(read_folder(two_splits, "easy", "train"))


def test_the_subsets_of_a_folder(two_subsets: Path) -> None:
    assert rows_of(two_subsets, "easy", "train") == [{"text": "one"}]
    assert rows_of(two_subsets, "hard", "held") == [{"text": "three"}]
    with pytest.raises(UserError, match=r"has no split 'held'; .*: train$"):
        list(read_folder(two_subsets, "easy", "held"))
    with pytest.raises(UserError, match=r"has several subsets; set data\.subset to one of: easy, hard"):
        list(read_folder(two_subsets, None, "train"))


def test_a_card_that_leads_out_of_its_folder_is_refused(two_subsets: Path) -> None:
    write(two_subsets.parent / "secret.jsonl", [{"text": "secret"}])
    (two_subsets / "README.md").write_text(CARD.replace("easy/*.jsonl", "../set/../secret.jsonl"))
    with pytest.raises(UserError, match=r"names .*secret\.jsonl; a data set may only name files in its folder"):
        list(read_folder(two_subsets, "easy", "train"))


@pytest.mark.parametrize("option", ["sep: ';'", "features: [{name: text, dtype: int64}]", "skiprows: 1"])
def test_options_of_a_card_that_change_the_rows_are_refused(tmp_path: Path, option: str) -> None:
    folder = write(tmp_path / "set" / "train.csv", ROWS).parent
    lines(folder / "README.md", f"---\nconfigs:\n- {{config_name: default, data_files: train.csv, {option}}}\n---\n")
    with pytest.raises(UserError, match=rf"set: its data set card sets {option.split(':')[0]}, but files are read"):
        list(read_folder(folder, None, "train"))


def test_a_part_of_a_split_that_was_saved(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS, split="validation").select([1])
    part.save_to_disk(tmp_path / "set", num_shards=1)
    assert rows_of(tmp_path / "set", None, "validation") == ROWS[1:]
    with pytest.raises(UserError, match=r"set: has no split 'train'; .*: validation$"):
        list(read_folder(tmp_path / "set", None, "train"))
    (tmp_path / "set" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"set: cannot be read as a data set"):
        list(read_folder(tmp_path / "set", None, "validation"))


def test_an_empty_file_beside_others(two_splits: Path) -> None:
    """An empty shard is no error; an empty split is."""
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, two_splits / "data" / "train-00000-of-00002.parquet")
    assert rows_of(two_splits, None, "train") == [{"text": "three"}]
    pyarrow.parquet.write_table(empty, two_splits / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"split 'test' has no rows; name another"):
        rows_of(two_splits, None, "test")


def test_folders_that_are_not_data_sets(two_splits: Path, tmp_path: Path) -> None:
    (two_splits / "set.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"cannot be read as a data set: .*scripts are no longer supported"):
        list(read_folder(two_splits, None, "train"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="cannot be read as a data set"):
        list(read_folder(tmp_path / "none", None, "train"))
    (tmp_path / "none" / "book.txt").write_text("Once.")
    with pytest.raises(UserError, match=r"none/book\.txt: unknown type of data file; use \.jsonl"):
        list(read_folder(tmp_path / "none", None, "train"))


def test_data_files_of_a_folder_that_belong_to_no_split_are_reported(tmp_path: Path) -> None:
    for name in ("train.jsonl", "more.jsonl", "old.csv"):
        write(tmp_path / name, ROWS)
    report = RowReport()
    assert len(list(read_examples(tmp_path, Reading(), report))) == len(ROWS)
    assert report_notes(report) == ["2 files of the folder belong to no split: more.jsonl, old.csv"]
