"""The data of an sft stage, prepared once for all steps that read the same rows with the same tokenizer: a grid over
weights tokenises once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.data.formats import Conversation, Example, PlainText, Row, Tokens
from stages.data.reader import DROPPED_ROWS, dropped_rows_text, source_name
from stages.data.tokenization import Preparer, content_key, prepare, problems
from stages.sft.config import SFTStage
from stages.system.integrity import broken_seal, seal

_COLUMNS: dict[type, dict[str, Any]] = {
    Example: {"prompt": Json(), "completion": Json(), "tools": Json()},
    Conversation: {"messages": Json(), "tools": Json()},
    PlainText: {"text": Value("string")},
    Tokens: {"input_ids": List(Value("int32")), "loss_weights": List(Value("float32"))},
}
"""Messages are kept as JSON: they may have keys that differ from row to row. Text in their place is written as JSON,
too, for Json takes a text that reads as JSON (`5`, `true`, `{"a": 1}`) for what it says."""


def prepared(
    context: Context, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, list[str]]:
    """The prepared rows of `part`, `train` or `eval`, and a line for each row that `on_bad_row: drop` left out.

    What is prepared lies in the cache under the hash of all that decides it: the file's content, how it is read, the
    tokenizer, `max_length` and `turns`; not the weights. Raises UserError.
    """
    stage: SFTStage = context.config
    source = context.inputs[part]
    reading = stage.data.reading(part, stage.data.format)
    if not source.path.is_dir():
        reading = replace(reading, split="")  # a file has none
    key = content_key(source.fingerprint, reading, Preparer(tokenizer, max_length, stage.data.turns).key())
    folder = context.cache / "prepared" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if broken_seal(folder) is not None:
            unfinished = folder.with_suffix(".unfinished")
            for left in (unfinished, folder):  # what a killed run left, or what was damaged since
                shutil.rmtree(left, ignore_errors=True)
            _prepare(context, part, tokenizer, max_length, unfinished)
            seal(unfinished)
            unfinished.rename(folder)
    lines = (folder / DROPPED_ROWS).read_text(encoding="utf-8").splitlines()
    return Dataset.load_from_disk(str(folder)), lines


def _prepare(
    context: Context, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, made: Path
) -> None:
    """Write the prepared rows, and the list of those that were dropped, to the folder `made`."""
    stage: SFTStage = context.config
    path = context.inputs[part].path
    dropped: list[str] = []
    rows = _as_dataset(lambda told: stage.rows(path, part, told), dropped, context.scratch / f"rows-{part}")
    place = f"{source_name(path, stage.data.reading(part, stage.data.format))}:"
    data = prepare(
        rows,
        tokenizer,
        max_length,
        stage.data.turns,
        stage.data.on_bad_row,
        place,
        stage.train.model_dump().get("dataset_num_proc"),
    )
    data.save_to_disk(str(made))
    dropped += [f"{place}{number}: {problem}" for number, problem in problems(data)]
    (made / DROPPED_ROWS).write_text(dropped_rows_text(dropped, [path]), encoding="utf-8")


def _as_dataset(rows: Callable[[list[str]], Iterator[tuple[int, Row]]], dropped: list[str], folder: Path) -> Dataset:
    """Rows as a data set that lies in `folder`, not in memory; each with its number in the column `row`."""
    columns = _COLUMNS[type(next(rows([]))[1])]

    def generate() -> Iterator[dict[str, Any]]:
        for number, row in rows(dropped):
            found = {name: value for name, value in row.columns().items() if value is not None}
            found |= {name: json.dumps(found[name]) for name in found if isinstance(columns[name], Json)}
            yield {"row": number, **dict.fromkeys(columns), **found}

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
