"""Data set folders: the files of their subsets and splits, as datasets finds them, read by our own readers.

Imports datasets only where a folder needs it, to keep planning fast.
"""

import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from stages.base import UserError
from stages.data.files import DATA_SUFFIXES, BadRow, Record, read_file
from stages.system.limits import LimitExceeded, limited

CARD_SECONDS = 60.0
"""Longest time to read the card and the names of the files of a folder."""


def read_folder(folder: Path, subset: str | None, split: str) -> Iterator[tuple[Path, int, Record | BadRow]]:
    """Yield (file, line or row number from 1, record) for every row of one split of a data set folder.

    Raises UserError if the folder cannot be read, or has no such subset or split; the message lists those it has.
    """
    subsets = folder_subsets(folder)
    if (subset or "default") not in subsets and (subset or len(subsets) > 1):
        problem = f"has no subset {subset!r}" if subset else "has several subsets"
        raise UserError(f"{folder}: {problem}; set data.subset to one of: {', '.join(subsets)}")
    files = files_by_split(folder, subset)
    if split not in files:
        raise UserError(
            f"{folder}: has no split {split!r}; set data.train_split or data.eval_split to one of: {', '.join(files)}"
        )
    number = 0
    for file in files[split]:
        for number, row in read_file(file, is_part=True):
            yield file, number, row
    if not number:
        raise UserError(f"{folder}: split {split!r} has no rows; name another")


def folder_subsets(folder: Path) -> list[str]:
    """Return the names of the subsets of a data set folder. Raises UserError."""
    import datasets

    try:
        # a relative path could be read as the name of a data set on the hub
        with limited(CARD_SECONDS):
            return ["default"] if is_saved(folder) else datasets.get_dataset_config_names(str(folder.resolve()))
    except (Exception, LimitExceeded) as error:
        raise _not_a_data_set(folder, error) from None


def files_by_split(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """Return split -> files of a subset: those that datasets.load_dataset reads, or that `save_to_disk` wrote.

    Raises UserError if there are none, or if the data set card has options that change how files are read.
    """
    import datasets

    try:
        files: Any
        if is_saved(folder):
            files = _saved_files(folder)
        else:
            with limited(CARD_SECONDS):
                config = datasets.load_dataset_builder(str(folder.resolve()), name=subset).config
            _refuse_options(folder, config)
            files = config.data_files or {}
        return {str(split): [_inside(folder, str(file)) for file in files[split]] for split in files}
    except UserError:
        raise
    except (Exception, LimitExceeded) as error:  # datasets raises errors of any type
        raise _not_a_data_set(folder, error) from None


def unread_files(folder: Path) -> list[str]:
    """Return the data files of a folder that belong to no split of any subset, by their paths in the folder.

    datasets reads files of one type, and if names say which split they belong to, no others.
    """
    if is_saved(folder):
        return []
    subsets = folder_subsets(folder)
    read = {file for subset in subsets for files in files_by_split(folder, subset).values() for file in files}
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in DATA_SUFFIXES and file not in read)
    names = (file.relative_to(folder) for file in files)
    return [str(name) for name in names if not any(part.startswith((".", "_")) for part in name.parts)]


def _not_a_data_set(folder: Path, error: BaseException) -> UserError:
    return UserError(f"{folder}: cannot be read as a data set: {textwrap.shorten(str(error), 200, placeholder=' ...')}")


def is_saved(folder: Path) -> bool:
    """Whether datasets' `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_files(folder: Path) -> dict[str, list[str]]:
    """Return split -> files of a Dataset or DatasetDict that `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(folder.resolve()))
    if isinstance(saved, datasets.Dataset):  # its split is `train[:10]` if it is a part of one
        saved = {re.split(r"\W", str(saved.split or "train"))[0]: saved}
    return {str(name): [file["filename"] for file in part.cache_files] for name, part in saved.items()}


def _refuse_options(folder: Path, config: Any) -> None:
    """Refuse options of a data set card that change how its files are read."""
    default = type(config)()
    others = ("name", "version", "description", "data_dir", "data_files")
    names = [field.name for field in fields(config) if field.name not in others]
    if options := [name for name in names if getattr(config, name) != getattr(default, name)]:
        raise UserError(
            f"{folder}: its data set card sets {', '.join(options)}, but files are read without options; convert them,"
            " and remove the option"
        )


def _inside(folder: Path, file: str) -> Path:
    """Return `file` below `folder`; refuse others, since a card can name any file of this machine and any address."""
    path, root = Path(os.path.normpath(file)), folder.resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{folder}: names {file}; a data set may only name files in its folder")
    return folder / path.relative_to(root)
