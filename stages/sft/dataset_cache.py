"""A cache of prepared data sets: steps that read the same rows with the same tokenizer tokenise them once, whatever
their weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.data.formats import TEMPLATE_COLUMNS, Conversation, Example, PlainText, Row, Tokens
from stages.data.reader import RowReport, dropped_rows_text, row_place
from stages.data.tokenization import Preparer, content_key, prepare, problems
from stages.sft.config import SFTStage
from stages.system.integrity import build_once, write_json

REPORT = "report.json"  # in the cached data set's folder

_COLUMNS: dict[type, dict[str, Any]] = {
    Example: {"prompt": Json(), "completion": Json(), **dict.fromkeys(TEMPLATE_COLUMNS, Json())},
    Conversation: {"messages": Json(), **dict.fromkeys(TEMPLATE_COLUMNS, Json())},
    PlainText: {"text": Value("string")},
    Tokens: {"input_ids": List(Value("int32")), "loss_weights": List(Value("float32"))},
}
"""Messages are JSON, since their keys can differ from row to row. Plain text in these columns is encoded as JSON too:
Json would parse a text such as `5`, `true` or `{"a": 1}`."""


def load_prepared(
    context: Context, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, RowReport]:
    """Load the prepared rows of `part` (`train` or `eval`) from the cache; prepare them first if they are missing.

    The cache key is a hash of everything that affects the rows: the file's content, the options for reading it, the
    tokenizer, `max_length` and `turns`, but not the weights.

    Returns:
        The rows, and what reading them showed.
    """
    stage: SFTStage = context.config
    source = context.inputs[part]
    reading = stage.data.reading(part, stage.data.format)
    if not source.path.is_dir():
        reading = replace(reading, split="")  # a single file has no splits
    key = content_key(source.fingerprint, reading, Preparer(tokenizer, max_length, stage.data.turns).key())
    folder = context.cache / "prepared" / key
    build_once(folder, partial(_prepare, context, part, tokenizer, max_length))
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return Dataset.load_from_disk(str(folder)), RowReport(**report)


def _prepare(
    context: Context, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, folder: Path
) -> None:
    stage: SFTStage = context.config
    path = context.inputs[part].path
    report = RowReport()
    rows = _as_dataset(partial(stage.rows, path, part), report, context.scratch / f"rows-{part}")
    place = row_place(path, stage.data.reading(part, stage.data.format))
    data = prepare(
        rows,
        tokenizer,
        max_length,
        stage.data.turns,
        stage.data.on_bad_row,
        place,
        stage.train.model_dump().get("dataset_num_proc"),
    )
    data.save_to_disk(str(folder))
    report.dropped += [f"{place(number)}: {problem}" for number, problem in problems(data)]
    report.dropped = dropped_rows_text(report.dropped, path).splitlines()
    write_json(folder / REPORT, asdict(report))


def _as_dataset(rows: Callable[[RowReport], Iterator[tuple[int, Row]]], report: RowReport, folder: Path) -> Dataset:
    """Write rows to a data set in `folder`, not in memory; the column `row` holds their numbers."""
    columns = _COLUMNS[type(next(rows(RowReport()))[1])]

    def generate() -> Iterator[dict[str, Any]]:
        for number, row in rows(report):
            values = {name: value for name, value in row.columns().items() if value is not None}
            values |= {name: json.dumps(values[name]) for name in values if isinstance(columns[name], Json)}
            yield {"row": number, **dict.fromkeys(columns), **values}

    try:
        return Dataset.from_generator(
            generate,
            features=Features({"row": Value("int64"), **columns}),
            cache_dir=str(folder),
            fingerprint=content_key(str(folder)),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
