"""A cache of prepared rows: steps that read the same rows with the same tokenizer tokenise them once. Training and
previews prepare rows in the same way, `prepare_rows`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from stages.base import Context, UserError
from stages.data.formats import TrainingRow
from stages.data.message_locations import REASONING_KEYS
from stages.data.reader import RowReport, dropped_rows_text, row_place
from stages.data.tokenization import ROW_JSON, Preparer, content_key, prepare, problems
from stages.system.integrity import build_once, read_json, write_json

REPORT = "report.json"  # in the cached data set's folder


class PreparedRows(NamedTuple):
    """The prepared rows of one split, and what is said about them."""

    dataset: Dataset
    stats: Any
    """Counts of the rows; each kind of training has its own."""
    dropped: list[str]
    """Place and reason of every row left out."""
    notes: list[str]


def load_rows(context: Context, part: str, preparer: Preparer, *settings: Any) -> tuple[Dataset, RowReport]:
    """Load the prepared rows of `part` (`train` or `eval`) from the cache; prepare them first if they are missing.

    The cache key is a hash of everything that affects the rows: the file's content, the options for reading it, and
    the preparer's key.

    Args:
        settings: further settings of the stage that decide which rows there are.

    Returns:
        The rows, and what reading them showed.
    """
    source, data = context.inputs[part], context.config.data
    reading = data.reading(part, data.format)
    if not source.path.is_dir():
        reading = replace(reading, split="")  # a single file has no splits
    folder = context.cache / "prepared" / content_key(source.fingerprint, reading, preparer.key(), *settings)
    build_once(folder, partial(_build, context, part, preparer))
    report = read_json(folder / REPORT)
    return Dataset.load_from_disk(str(folder)), RowReport(**report)


def _build(context: Context, part: str, preparer: Preparer, folder: Path) -> None:
    stage, path, report = context.config, context.inputs[part].path, RowReport()
    rows = _list_unread(stage.rows(path, part, report), report, str(preparer.tokenizer.chat_template))
    data, place = prepare_rows(stage, path, part, rows, preparer, context.scratch / folder.stem)
    data.save_to_disk(str(folder))
    report.dropped += [f"{place(number)}: {problem}" for number, problem in problems(data)]
    report.dropped = dropped_rows_text(report.dropped, path).splitlines()
    write_json(folder / REPORT, asdict(report))


def _list_unread(
    rows: Iterator[tuple[int, TrainingRow]], report: RowReport, template: str
) -> Iterator[tuple[int, TrainingRow]]:
    """Pass rows on; list variables and keys of messages that the chat template does not mention."""
    for number, row in rows:
        for name, value in row.columns().items():
            messages = value if name in _MESSAGES and isinstance(value, list) else []
            keys = value if name == "chat_template_kwargs" else dict.fromkeys(chain(*messages))
            unread = (f"{name}.{key}" for key in keys if key not in template and key not in _KNOWN_KEYS)
            report.unread_columns += [key for key in unread if key not in report.unread_columns]
        yield number, row


_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")
_KNOWN_KEYS = {"role", "content", "weight", "tool_calls", *REASONING_KEYS}
"""Keys of messages that are read, or whose loss is reported."""


def prepare_rows(
    stage: Any, path: Path, part: str, rows: Iterator[tuple[int, TrainingRow]], preparer: Preparer, folder: Path
) -> tuple[Dataset, Callable[[int], str]]:
    """Prepare rows of `part` of a TrainingStage, through files in `folder`; return them, and row_place for messages.

    Raises:
        UserError: rows cannot be used.
    """
    place = row_place(path, stage.data.reading(part, stage.data.format))
    processes = stage.train.model_dump().get("dataset_num_proc")
    return prepare(_as_dataset(rows, folder), preparer, stage.data.on_bad_row, place, processes), place


def _as_dataset(rows: Iterator[tuple[int, TrainingRow]], folder: Path) -> Dataset:
    """Write rows as JSON to a data set in `folder`, not in memory; the column `row` holds their numbers."""

    def generate() -> Iterator[dict[str, Any]]:
        for number, row in rows:
            yield {"row": number, ROW_JSON: json.dumps(row.columns())}

    try:
        return Dataset.from_generator(
            generate,
            features=Features({"row": Value("int64"), ROW_JSON: Value("string")}),
            cache_dir=str(folder),
            fingerprint=content_key(str(folder)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
