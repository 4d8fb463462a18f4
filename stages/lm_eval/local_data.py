"""A recipe's own items as Parquet files from which lm-eval, through datasets, gets every value as it is written."""

import json
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import yaml
from huggingface_hub import DatasetCard

import stages.data.exact_json  # noqa: F401  # lm-eval's items can have the feature Json
from stages.base import UserError
from stages.data.files import DATA_SUFFIXES, Record, read_rows
from stages.data.folders import files_by_split, folder_subsets, is_saved
from stages.system.integrity import build_once

_TEXT = {".json", ".jsonl", ".csv"}
"""Files whose values datasets would convert: `NA` to null, `007` to 7.0, dates to timestamps."""


def parquet_of_files(files: Mapping[str, Path], out: Path) -> dict[str, str]:
    """Write the rows of each split's file to Parquet below `out`; return split -> path."""
    build_once(out, partial(_write_splits, {split: [file] for split, file in files.items()}))
    return {split: str((out / f"{split}.parquet").resolve()) for split in files}


def parquet_of_folder(folder: Path, out: Path) -> Path:
    """Return a folder that datasets loads without converting a value.

    It is `folder` if that has Parquet files, or files that only datasets reads. Else it is `out`, with the same subsets
    and splits in Parquet.
    """
    if not is_saved(folder) and not any(file.suffix.lower() in _TEXT for file in folder.rglob("*")):
        return folder
    subsets = {name: files_by_split(folder, name) for name in folder_subsets(folder)}
    suffixes = {file.suffix.lower() for splits in subsets.values() for file in chain(*splits.values())}
    if not suffixes <= set(DATA_SUFFIXES) or not (suffixes & _TEXT or is_saved(folder)):
        return folder
    build_once(out, partial(_write_folder, folder, subsets))
    return out


def _write_folder(folder: Path, subsets: dict[str, dict[str, list[Path]]], out: Path) -> None:
    default = None if is_saved(folder) else datasets.get_dataset_default_config_name(str(folder.resolve()))
    configs = []
    for i, (name, splits) in enumerate(subsets.items()):
        _write_splits(splits, out / str(i))
        files = [{"split": split, "path": f"{i}/{split}.parquet"} for split in splits]
        configs.append({"config_name": name, "data_files": files, "default": name == default})
    card = DatasetCard.load(folder / "README.md").data.to_dict() if (folder / "README.md").is_file() else {}
    # the features that a card declares remain in force
    header = {"configs": configs} | {key: card[key] for key in ("dataset_info",) if key in card}
    (out / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n", encoding="utf-8")


def _write_splits(files: Mapping[str, list[Path]], out: Path) -> None:
    """Write a Parquet file per split; a column has the same type in all of them."""
    rows: dict[str, list[Record]] = {
        split: [row for file in files[split] for _, row in read_rows(file)] for split in files
    }
    names = dict.fromkeys(chain.from_iterable(chain.from_iterable(rows.values())))
    table = pyarrow.table({name: _column(name, [row.get(name) for row in chain(*rows.values())]) for name in names})
    out.mkdir(parents=True)
    start = 0
    for split in rows:
        pyarrow.parquet.write_table(table.slice(start, len(rows[split])), out / f"{split}.parquet")
        start += len(rows[split])


def _column(name: str, values: list[Any]) -> pyarrow.Array:
    """Return the values in the type that Arrow infers, or as datasets' feature Json if that type changes a value."""
    try:
        array = pyarrow.array(values)
        # Arrow fills missing keys of objects with null; Parquet has no objects without keys
        if repr(array.to_pylist()) == repr(values) and "struct<>" not in str(array.type):
            return array
    except (pyarrow.ArrowException, ValueError, OverflowError):
        pass  # the values have different types
    try:
        encoded = [None if value is None else json.dumps(value) for value in values]
    except TypeError as error:
        raise UserError(f"column {name!r} has values of different types: {error}; write them as text") from None
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(encoded, pyarrow.string()))
