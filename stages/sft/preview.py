"""What an sft stage would learn from, token by token: a few rows as `stages.data.tokenization` prepares them for
training, with what each token is and weighs. For people on a terminal and as a page, for programs as JSON; trains
nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from stages.data.segments import Segment
from stages.sft.config import SFTStage
from stages.sft.preview_terminal import OnTerminal
from stages.sft.token_display import SIGNS, TIMES, Pieces, visible

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    id: int
    text: str
    """As it decodes; bytes that are no whole letter as `<0xC3>`."""
    special: bool
    segment: Segment
    weight: float
    """In the loss: its segment's times its message's own; 0 for the first of a row, which nothing predicts."""
    label: str
    """What it is and weighs, in words."""

    @property
    def shown(self) -> list[str]:
        """Its text with white space to be seen, a part for each line."""
        text = visible(self.text) or f"<id {self.id}>"
        return [part for part in text.replace("↵", "↵\n").split("\n") if part]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are and weigh the same."""

    tokens: list[Token]
    place: int
    """The number of its first token in the row, from 0."""
    boundary: bool
    """Whether a completion begins here, after something that is none."""

    @property
    def first(self) -> Token:
        """A token that stands for all."""
        return self.tokens[0]


@dataclass(frozen=True)
class PreviewedExample:
    """One row, as it would be trained on."""

    row: int
    """Its number in the file, from 1."""
    tokens: list[Token]
    cut: int
    """Tokens cut off at max_length."""
    merged: int
    """Tokens that reach over a boundary between segments."""
    problem: str = ""
    """Why the row cannot be used; then it has no tokens."""

    @property
    def weighing(self) -> dict[str, int]:
        """How many tokens weigh in the loss, by segment."""
        found = [token.segment for token in self.tokens if token.weight]
        return {segment.name.lower(): found.count(segment) for segment in Segment if segment in found}

    @property
    def runs(self) -> Iterator[Run]:
        """Its tokens in runs."""
        place, before = 0, None
        for _, group in groupby(self.tokens, key=lambda token: token.label):
            tokens = list(group)
            segment = tokens[0].segment
            yield Run(tokens, place, segment == Segment.COMPLETION and before not in (None, segment))
            place, before = place + len(tokens), segment

    @property
    def counts(self) -> str:
        """Its tokens in numbers."""
        weighing = " + ".join(f"{count} {name}" for name, count in self.weighing.items()) or "none"
        merged = f"; {self.merged} over a boundary" if self.merged else ""
        return f"{_tokens(len(self.tokens))}, {self.cut} cut off; in the loss: {weighing}{merged}"

    def notes(self, max_length: int | None) -> Iterator[str]:
        """What a reader should know of it."""
        if self.problem:
            yield f"this row cannot be used: it {self.problem}"
        elif not self.weighing:
            yield "no token weighs anything, so training leaves this row out"
        if self.cut:
            yield f"{_tokens(self.cut)} cut off at max_length {max_length}; raise train.max_length to keep them"


@dataclass(frozen=True)
class Preview:
    """What one stage would learn from."""

    step: str
    file: str
    rows: int
    """All rows of the file."""
    max_length: int | None
    weights: dict[str, float]
    """By segment, those that occur."""
    examples: list[PreviewedExample]

    @property
    def title(self) -> str:
        """What is shown, in a line."""
        return f"{self.step}: {len(self.examples)} of {self.rows} rows of {self.file}"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "step": self.step,
            "file": self.file,
            "rows": self.rows,
            "max_length": self.max_length,
            "weights": self.weights,
            "examples": [
                {
                    "row": example.row,
                    "tokens": [
                        {
                            "id": token.id,
                            "text": token.text,
                            "segment": token.segment.name.lower(),
                            "weight": token.weight,
                            "special": token.special,
                        }
                        for token in example.tokens
                    ],
                    "weighing": example.weighing,
                    "cut": example.cut,
                    "merged": example.merged,
                    "problem": example.problem,
                }
                for example in self.examples
            ],
        }

    def html(self) -> str:
        """One self-contained page: no scripts, nothing fetched."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
        )
        environment.filters |= {"signs": _fade_signs, "repr": repr}
        return environment.get_template("preview.html.jinja").render(preview=self)


def preview(step: str, stage: SFTStage, paths: dict[str, Path], count: int) -> tuple[dict[str, Any], str, OnTerminal]:
    """`count` rows of the training file, evenly spread from the first on, as JSON, as an HTML page and for rich.

    `paths` has the training file as `train`, and as `model` a folder with the tokenizer. Raises UserError.
    """
    from stages.training.loop import load_tokenizer

    path = paths["train"]
    total = sum(1 for _ in _rows(stage, path))
    wanted = {index * total // count for index in range(count)}
    rows = [row for index, row in enumerate(_rows(stage, path)) if index in wanted]
    tokenizer = load_tokenizer(paths["model"], [row for _, row in rows], stage.trust_remote_code)
    table = stage.weights.segment_weights
    max_length = _max_length(stage)
    shown = examples(_prepared(stage, rows, tokenizer, max_length, path), tokenizer, table)
    occurring = {token.segment for example in shown for token in example.tokens}
    weights = {segment.name.lower(): table[segment] for segment in Segment if segment in occurring}
    place = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    found = Preview(step, _place(stage, Path(place)), total, max_length, weights, shown)
    return found.as_json(), found.html(), OnTerminal(found)


def examples(
    prepared: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, table: Sequence[float]
) -> list[PreviewedExample]:
    """Rows of `stages.sft.data.prepare` as they are shown; `table` is a weight by Segment."""
    pieces = Pieces(tokenizer)
    shown = []
    for row in prepared:
        ids, segments = row["input_ids"], row["segments"]
        factors = row["factors"] or [1.0] * len(ids)
        tokens = []
        for place, (id, value, factor) in enumerate(zip(ids, segments, factors, strict=True)):
            segment = Segment(value)
            weight = _short(table[segment] * factor) if place else 0.0
            label = _label(segment, table[segment], factor) if place else "not predicted"
            tokens.append(Token(id, pieces.text(id), pieces.special(id), segment, weight, label))
        shown.append(PreviewedExample(row["row"], tokens, row["cut"], row["merged"], row["problem"]))
    return shown


def _rows(stage: SFTStage, path: Path) -> Iterator[tuple[int, Any]]:
    """(row number, row) for every row of the training file."""
    return stage.rows(path, "train")


def _prepared(
    stage: SFTStage,
    rows: list[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    path: Path,
) -> Dataset:
    """The rows, prepared as the trainer does it."""
    from datasets import Dataset

    from stages.data.tokenization import prepare

    dataset = Dataset.from_list([row.columns() | {"row": number} for number, row in rows])
    data = stage.data
    return prepare(dataset, tokenizer, max_length, data.turns, data.on_bad_row, f"{_place(stage, path)}:")


def _max_length(stage: SFTStage) -> int | None:
    """What the recipe sets, else TRL's default."""
    from trl import SFTConfig

    return stage.train.model_dump().get("max_length", SFTConfig.max_length)


def _place(stage: SFTStage, path: Path) -> str:
    """What stands before a row's number: the file, or the data set's folder with the split."""
    return f"{path}[{stage.data.train_split}]" if path.is_dir() else str(path)


def _label(segment: Segment, weight: float, factor: float) -> str:
    """What a token is, with its segment's weight and its message's own where they are not 1."""
    numbers = [0.0] if weight * factor == 0 else [n for n in (weight, factor) if n != 1] or [1.0]
    return segment.name.lower() + " " + "".join(f"{TIMES}{number:g}" for number in numbers)


def _short(number: float) -> float:
    """Without the digits that float32 made up."""
    return float(f"{number:.6g}")


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count != 1 else ''}"


def _fade_signs(text: str) -> Markup:
    """Escaped text, with the signs that stand for white space as <i>, so that they can be less prominent."""
    safe = str(escape(text))
    for sign in SIGNS.values():
        safe = safe.replace(sign, f"<i>{sign}</i>")
    return Markup(safe.replace("↵</i>", "↵</i><br>"))
