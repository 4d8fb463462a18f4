"""Data files in every kind and format, read as training rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stages.base import BadInput
from stages.rows import Example, read_examples, read_pairs

ROWS = [{"prompt": "Sky?", "completion": "blue"}, {"prompt": "Snow?", "completion": "white"}]
EXAMPLES = [Example("Sky?", "blue"), Example("Snow?", "white")]


def write(path: Path, rows: list[dict]) -> Path:
    """`rows` in the kind of file that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    assert read_examples(write(tmp_path / f"rows{suffix}", ROWS), "auto") == EXAMPLES


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(BadInput, match=r"rows\.txt: unknown kind of data file; known are \.jsonl"):
        read_examples(tmp_path / "rows.txt", "auto")


def test_alpaca_columns_become_a_conversation(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add them.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    first, second = read_examples(write(tmp_path / "a.jsonl", rows), "auto")
    assert first.prompt == [{"role": "user", "content": "Add them.\n\n1, 2"}]
    assert first.completion == [{"role": "assistant", "content": "3"}]
    assert second.prompt == [{"role": "user", "content": "Say hi."}]


def test_the_official_scripts_text_rule(tmp_path: Path) -> None:
    """One trailing space off the prompt, one space before the response, the marker stands for EOS."""
    rows = [{"prompt": "Sky?  ", "response": "blue###eos_token###"}, {"prompt": "Snow?", "response": "white"}]
    assert read_examples(write(tmp_path / "o.jsonl", rows), "official") == [
        Example("Sky? ", " blue"),
        Example("Snow?", " white"),
    ]


def test_text_rows_are_all_completion(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "t.jsonl", [{"text": "Once."}]), "auto") == [Example("", "Once.")]


def test_pairs_of_other_rows(tmp_path: Path) -> None:
    """Chosen is the row's own completion; rejected is another row's and never the same text; the seed decides."""
    rows = [{"prompt": f"{i}?", "completion": str(i % 3)} for i in range(30)]
    path = write(tmp_path / "p.jsonl", rows)
    pairs = read_pairs(path, "auto", "other_row", seed=1)
    assert [(pair.prompt, pair.chosen) for pair in pairs] == [(row["prompt"], row["completion"]) for row in rows]
    assert all(pair.rejected in {"0", "1", "2"} - {pair.chosen} for pair in pairs)
    assert read_pairs(path, "auto", "other_row", seed=1) == pairs
    assert read_pairs(path, "auto", "other_row", seed=2) != pairs


def test_pairs_need_another_completion(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(BadInput, match="needs rows with different completions"):
        read_pairs(path, "auto", "other_row", seed=1)


def test_many_bad_rows_are_listed_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [ROWS[0]] + [{"prompt": "x"}] * 15)
    with pytest.raises(BadInput) as caught:
        read_examples(path, "auto")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}:2: column 'completion' is missing")
    assert len(lines) == 11
    assert lines[-1] == "and 5 more rows like these"
