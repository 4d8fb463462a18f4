"""The items that lm-eval's tasks see are those of the files, whatever their type."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from stages.base import Context, UserError
from stages.lm_eval.tasks import load_benchmarks
from tests.stages.lm_eval.conftest import GENERATE

Step = Callable[..., Context]

pytestmark = pytest.mark.usefixtures("own_tasks_only")

TEXTS = [
    {"question": "Say NA.", "answer": "NA"},
    {"question": "Code of Bond?", "answer": "007"},
    {"question": "When, exactly?", "answer": "2020-01-31T10:00:00Z"},
    {"question": "The empty word?\nNone", "answer": ""},
]
"""Items that every type of file can hold."""
VALUES: list[dict[str, Any]] = [
    {"question": "a", "answer": 7, "choices": ["NA", "b"], "meta": {"x": 7.56}, "mixed": "5", "count": 2**40},
    {"question": "b", "answer": 7.56, "choices": ["007"], "meta": {"y": "1"}, "mixed": 5, "count": 3},
    {"question": "c", "answer": 0.1 + 0.2, "choices": [], "meta": {"x": 1, "y": [None, 2]}, "mixed": [1], "count": 4},
]
"""Items with values of different types."""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path)
    return path


def test_another_split_is_scored(step: Step, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder" / "test.jsonl", TEXTS).parent
    write(folder / "validation.jsonl", TEXTS[1:])
    assert items(step, tmp_path, dataset=str(folder), split="validation") == TEXTS[1:]
    with pytest.raises(UserError, match="has no split 'dev', only") as error:
        items(step, tmp_path, dataset=str(folder), split="dev")
    assert error.value.key == "tasks.0.split"
    with pytest.raises(UserError, match="test is the split that mine scores anyway; leave it out"):
        items(step, tmp_path, dataset=str(folder), split="test")


def items(step: Step, folder: Path, **source: Any) -> list[dict[str, Any]]:
    """The items of a task whose template needs only `question`, as lm-eval gives them to it."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    changes = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump(GENERATE | changes | {"task": "mine"}))
    context = step(tasks=[{"task": "mine", **source}], include_path=str(folder / "tasks"))
    files = {name: item.path for name, item in context.inputs.items() if name != "model"}
    (benchmark,) = load_benchmarks(context.config, files, context.scratch)
    return list(benchmark.tasks["mine"].eval_docs)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_text_stays_text(step: Step, tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"items{suffix}", TEXTS)
    assert items(step, tmp_path, data={"test": str(path)}) == TEXTS
    folder = write(tmp_path / "folder" / f"test{suffix}", TEXTS).parent
    assert items(step, tmp_path, dataset=str(folder)) == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_values_keep_their_types(step: Step, tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"items{suffix}", VALUES)
    assert repr(items(step, tmp_path, data={"test": str(path)})) == repr(VALUES)
    folder = write(tmp_path / "folder" / f"test{suffix}", VALUES).parent
    assert repr(items(step, tmp_path, dataset=str(folder))) == repr(VALUES)


def test_columns_have_one_type_in_all_splits(step: Step, tmp_path: Path) -> None:
    """lm-eval's own loader takes the types of the first split. A key that a row lacks is None, as in any data set."""
    test = write(tmp_path / "test.csv", [{"question": "a", "answer": "007"}])
    dev = write(tmp_path / "dev.jsonl", [{"question": "b", "answer": 7, "note": "x"}])
    rows = items(step, tmp_path, data={"test": str(test), "dev": str(dev)})
    assert rows == [{"question": "a", "answer": "007", "note": None}]


def test_a_folder_keeps_its_subsets(step: Step, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("easy", "hard"):
        write(folder / name / "rows.csv", [{"question": name, "answer": "1.0"}])
    files = {name: [{"split": "test", "path": f"{name}/*.csv"}] for name in ("easy", "hard")}
    configs = [{"config_name": name, "data_files": files[name], "default": name == "hard"} for name in files]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    assert items(step, tmp_path, dataset=str(folder)) == [{"question": "hard", "answer": "1.0"}]


def test_a_folder_of_save_to_disk(step: Step, tmp_path: Path) -> None:
    datasets.DatasetDict(test=datasets.Dataset.from_list(TEXTS)).save_to_disk(tmp_path / "set")
    assert items(step, tmp_path, dataset=str(tmp_path / "set")) == TEXTS


def test_a_declared_type_remains_in_force(step: Step, tmp_path: Path) -> None:
    folder = write(tmp_path / "set" / "test.csv", [{"question": "a", "answer": "no"}]).parent
    names = {"class_label": {"names": {"0": "yes", "1": "no"}}}
    features = [{"name": "question", "dtype": "string"}, {"name": "answer", "dtype": names}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': {'features': features}})}---\n")
    assert items(step, tmp_path, dataset=str(folder)) == [{"question": "a", "answer": 1}]


def test_a_bad_row_is_named(step: Step, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.csv").write_text('question,answer\na,b\nc,"d\n')
    with pytest.raises(UserError, match=r"set/test\.csv:3: in the row that starts here, a quoted cell is not closed"):
        items(step, tmp_path, dataset=str(folder))
