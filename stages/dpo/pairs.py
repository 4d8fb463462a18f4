"""Preference pairs -> tokens, with the columns that TRL's DPOTrainer trains on, and which of them it can learn from.

A pair is tokenised as two rows of an sft stage: prompt and chosen, prompt and rejected. So templates, boundaries and
EOS tokens are those of sft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy
import pyarrow
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.data.dataset_cache import load_rows
from stages.data.reader import DROPPED_ROWS, RowReport, dropped_rows_text, report_notes, source_name
from stages.data.segments import Segment
from stages.data.tokenization import Preparer, content_key
from stages.dpo.config import DPOStage

MAX_LISTED = 10  # row numbers in a note
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's
TOO_LONG = "the prompt fills max_length"
EQUAL = "chosen and rejected are equal within max_length"


@dataclass
class PairPreparer:
    """Tokenises batches of pairs, one row for each.

    - `prompt_ids`, `chosen_ids`, `rejected_ids`: not truncated, which TRL's collator does. As in TRL, the prompt is
      what prompt + chosen and prompt + rejected start with, up to the first token of either completion;
    - `prompt_segments`: the Segment of each token of the prompt;
    - `row`, `problem`: as in stages.data.tokenization.prepare;
    - `merged`: number of boundary tokens, which reach from the prompt into a completion;
    - `other_prompt`: whether the tokens before chosen and before rejected differ.
    """

    features: ClassVar[Features] = Features(
        {
            "prompt_ids": List(Value("int32")),
            "chosen_ids": List(Value("int32")),
            "rejected_ids": List(Value("int32")),
            "prompt_segments": List(Value("int8")),
            "row": Value("int64"),
            "merged": Value("int32"),
            "other_prompt": Value("bool"),
            "problem": Value("string"),
        }
    )

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.preparer = Preparer(self.tokenizer, max_length=None)

    def key(self) -> tuple[Any, ...]:
        """Return everything that decides the result, except the rows."""
        return ("pairs", *self.preparer.key())

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> pyarrow.Table:
        """Tokenise a batch of pairs, column -> values."""
        columns = dict(rows)
        completions = columns.pop("chosen") + columns.pop("rejected")
        table = self.preparer({**{name: 2 * values for name, values in columns.items()}, "completion": completions}, [])
        ids, segments, multipliers = (_arrays(table[name]) for name in ("input_ids", "segments", "factors"))
        merged = table["merged"].to_numpy().reshape(2, -1).sum(axis=0)
        problems = [
            problem or _weight_problem(*sequence)
            for problem, *sequence in zip(table["problem"].to_pylist(), segments, multipliers, strict=True)
        ]
        pairs = []
        for first, row in enumerate(columns["row"]):
            second = first + len(columns["row"])
            starts = _completion_start(segments[first]), _completion_start(segments[second])
            prompt = min(*starts, _shared_length(ids[first], ids[second]))
            pair = {
                "prompt_ids": ids[first][:prompt],
                "chosen_ids": ids[first][prompt:],
                "rejected_ids": ids[second][prompt:],
                "prompt_segments": segments[first][:prompt],
                "merged": merged[first],
                "other_prompt": starts != (prompt, prompt),
            }
            if problem := _problem(problems[first], problems[second]):
                pair = {name: [] for name in pair} | {"merged": 0, "other_prompt": False}
            pairs.append(pair | {"row": row, "problem": problem})
        return pyarrow.Table.from_pylist(pairs, schema=self.features.arrow_schema)


def _problem(chosen: str, rejected: str) -> str:
    if chosen == rejected:
        return chosen
    return "; ".join(f"{name} {text}" for name, text in (("chosen", chosen), ("rejected", rejected)) if text)


def _weight_problem(segments: numpy.ndarray, multipliers: numpy.ndarray) -> str:
    """Say that a message of the completion has a weight; `multipliers` is empty if no message has one."""
    if (multipliers[_completion_start(segments) :] == 1).all():
        return ""
    return "has a message with a weight, which dpo does not use; remove the weight"


def _arrays(lists: pyarrow.ChunkedArray) -> list[numpy.ndarray]:
    return [values.values.to_numpy() for values in lists]


def _completion_start(segments: numpy.ndarray) -> int:
    """Index of the first token of the completion, which reaches to the end."""
    is_completion = segments == Segment.COMPLETION
    return int(is_completion.argmax()) if is_completion.any() else len(segments)


def _shared_length(a: numpy.ndarray, b: numpy.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


class Kept(NamedTuple):
    """The tokens of prompt + completion that TRL's collator keeps, as slices of prompt and completion."""

    prompt: slice
    completion: slice

    @property
    def tokens(self) -> int:
        return self.prompt.stop - self.prompt.start + self.completion.stop - self.completion.start


def kept(prompt: int, completion: int, max_length: int | None, truncation_mode: str) -> Kept:
    """Truncate a sequence of `prompt` + `completion` tokens as TRL's collator does."""
    excess = 0 if max_length is None else max(0, prompt + completion - max_length)
    if truncation_mode == "keep_start":
        end = prompt + completion - excess
        return Kept(slice(0, min(prompt, end)), slice(0, max(0, end - prompt)))
    return Kept(slice(min(excess, prompt), prompt), slice(max(0, excess - prompt), completion))


def why_left_out(pair: dict[str, Any], max_length: int | None, truncation_mode: str) -> str:
    """Return why there is nothing to learn from a prepared pair; empty if there is.

    TRL would leave out the first kind itself, and train on the second, whose gradient is 0.
    """
    prompt, chosen, rejected = (pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    if max_length is not None and truncation_mode == "keep_start" and len(prompt) >= max_length:
        return TOO_LONG
    parts = [(kept(len(prompt), len(ids), max_length, truncation_mode), ids) for ids in (chosen, rejected)]
    (first, first_ids), (second, second_ids) = [(part.prompt, ids[part.completion]) for part, ids in parts]
    return EQUAL if first == second and list(first_ids) == list(second_ids) else ""


@dataclass(frozen=True)
class PairStats:
    """Counts of the pairs of a data set. `rows` is the sum of the next four."""

    rows: int
    rows_used: int
    rows_bad: int
    """Unusable rows, with `on_bad_row: drop`."""
    rows_too_long: int
    """Left out because the prompt fills max_length."""
    rows_equal: int
    """Left out because chosen and rejected have the same tokens within max_length."""
    rows_other_prompt: int
    """Pairs whose prompt has other tokens before chosen than before rejected, left out or not."""
    tokens: int
    """Of the pairs that are used, each prompt twice."""
    tokens_truncated: int
    """Beyond max_length, of all pairs, each prompt twice."""
    tokens_merged: int
    """Tokens that span the boundary before a completion, of all pairs; they belong to the completion."""
    longest: int
    """Tokens of the longest prompt with a completion that is used."""
    largest_id: int
    """The largest token id in the pairs that are used."""


@dataclass(frozen=True)
class Pairs:
    """The pairs that training uses, and what a person has to know of the others."""

    dataset: Dataset
    stats: PairStats
    dropped: list[str]
    """Place and reason of every row left out."""
    notes: list[str]


def length_options(stage: DPOStage) -> tuple[int | None, str]:
    """Return `max_length` and `truncation_mode`."""
    from stages.library_options.option_docs import option_help  # a large file

    options = {name: option.default for name, option in option_help("DPOConfig").items()} | stage.train.model_dump()
    return options["max_length"], options["truncation_mode"]


def load_pairs(context: Context, part: str, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """Load the pairs of `part` (`train` or `eval`) of a dpo stage from the cache; prepare them first if needed.

    Raises:
        UserError: no pair can be used.
    """
    stage: DPOStage = context.config
    drawn = (stage.seed,) if stage.data.rejected == "other_row" else ()
    prepared, report = load_rows(context, part, PairPreparer(tokenizer), stage.data.rejected, *drawn)
    return _select(prepared, report, context, part)


class _Fit(NamedTuple):
    """What training makes of one pair. Counts of tokens have the prompt twice."""

    row: int
    reason: str
    """Why it is left out; empty if it is used."""
    prompt: int
    tokens: int
    truncated: int
    longest: int
    largest_id: int
    merged: int
    other_prompt: bool


def _fit(pair: dict[str, Any], max_length: int | None, truncation_mode: str) -> _Fit:
    ids = [pair[name] for name in ID_COLUMNS]
    prompt, *completions = map(len, ids)
    lengths = [kept(prompt, completion, max_length, truncation_mode).tokens for completion in completions]
    return _Fit(
        row=pair["row"],
        reason=pair["problem"] or why_left_out(pair, max_length, truncation_mode),
        prompt=prompt,
        tokens=sum(lengths),
        truncated=2 * prompt + sum(completions) - sum(lengths),
        longest=max(lengths),
        largest_id=max(int(part.max(initial=0)) for part in ids),
        merged=pair["merged"],
        other_prompt=pair["other_prompt"],
    )


def _select(prepared: Dataset, report: RowReport, context: Context, part: str) -> Pairs:
    """Leave out the pairs from which there is nothing to learn."""
    stage, path = context.config, context.inputs[part].path
    max_length, truncation_mode = length_options(stage)
    fits = [_fit(pair, max_length, truncation_mode) for pair in _iterate(prepared)]
    used = [fit for fit in fits if not fit.reason]
    left_out = [fit for fit in fits if fit.reason in (TOO_LONG, EQUAL)]  # report lists the others
    stats = PairStats(
        rows=len(used) + len(left_out) + len(report.dropped),
        rows_used=len(used),
        rows_bad=len(report.dropped),
        rows_too_long=sum(fit.reason == TOO_LONG for fit in fits),
        rows_equal=sum(fit.reason == EQUAL for fit in fits),
        rows_other_prompt=sum(fit.other_prompt for fit in fits),
        tokens=sum(fit.tokens for fit in used),
        tokens_truncated=sum(fit.truncated for fit in fits),
        tokens_merged=sum(fit.merged for fit in fits),
        longest=max((fit.longest for fit in used), default=0),
        largest_id=max((fit.largest_id for fit in used), default=0),
    )
    if not used:
        raise _nothing_to_learn(part, stats, max_length, max(fit.prompt for fit in fits))
    fingerprint = content_key(part, stage.train.model_dump())  # TRL caches the reference's log-probabilities under it
    indices = [index for index, fit in enumerate(fits) if not fit.reason]
    dataset = prepared.select_columns(list(ID_COLUMNS)).select(indices, new_fingerprint=fingerprint)
    place = f"{source_name(path, stage.data.reading(part, stage.data.format))}:"
    lines = dropped_rows_text([f"{place}{fit.row}: {fit.reason}" for fit in left_out], path).splitlines()
    notes = _notes(part, stats, [fit.row for fit in fits if fit.other_prompt])
    return Pairs(dataset, stats, report.dropped + lines, report_notes(part, report) + notes)


def _iterate(prepared: Dataset) -> Iterator[dict[str, Any]]:
    """Yield prepared pairs with token ids as arrays."""
    for batch in prepared.with_format("arrow").iter(1_000):
        columns = {
            name: _arrays(batch[name]) if name in ID_COLUMNS else batch[name].to_pylist() for name in batch.column_names
        }
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _nothing_to_learn(part: str, stats: PairStats, max_length: int | None, longest_prompt: int) -> UserError:
    """Return the error for a data set of which no pair is used."""
    if stats.rows_too_long:
        reason = f"{stats.rows_too_long} prompts fill train.max_length {max_length}, the longest with {longest_prompt}"
        reason += " tokens"
    else:
        reason = EQUAL
    if stats.tokens_truncated:
        return UserError(
            f"no pair of the {part} data can be used: {reason}; raise train.max_length", "train.max_length"
        )
    return UserError(f"no pair of the {part} data can be used: {reason}; check the rows", f"data.{part}")


def _notes(part: str, stats: PairStats, other_prompt: list[int]) -> list[str]:
    rows = ", ".join(map(str, other_prompt[:MAX_LISTED])) + (", ..." if len(other_prompt) > MAX_LISTED else "")
    counts = {
        f"pairs whose prompt fills max_length were left out; raise train.max_length; {DROPPED_ROWS} lists them": (
            stats.rows_too_long
        ),
        f"pairs whose chosen and rejected are equal within max_length were left out; {DROPPED_ROWS} lists them": (
            stats.rows_equal
        ),
        "tokens lie beyond max_length and were cut off": stats.tokens_truncated,
        "tokens span the boundary between prompt and completion": stats.tokens_merged,
        "pairs have other prompt tokens before chosen than before rejected, and train on what both start with as the"
        f" prompt: rows {rows}": stats.rows_other_prompt,
    }
    return [f"{part} data: {count} {text}" for text, count in counts.items() if count]
