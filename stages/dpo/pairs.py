"""Preference pairs -> tokens, with the columns that TRL's DPOTrainer trains on, and which of them it can learn from.

A pair is tokenised as two rows of an sft stage: prompt and chosen, prompt and rejected. So templates, boundaries and
EOS tokens are those of sft.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any, ClassVar

import pyarrow
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.data.dataset_cache import PreparedRows, load_rows
from stages.data.reader import DROPPED_ROWS, dropped_rows_text, report_notes, row_place
from stages.data.segments import Segment
from stages.data.tokenization import Preparer, content_key, date_notes
from stages.dpo.config import DPOStage

MAX_LISTED = 10  # row numbers in a note
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's
TOO_LONG = "the prompt fills max_length"
EQUAL = "chosen and rejected are equal within max_length"


@dataclass
class PairPreparer(Preparer):
    """Tokenises batches of pairs. The result has the columns `row`, `merged`, `unwritten` and `problem` of prepared
    rows, where a pair is the sum of its two rows, and

    - `prompt_ids`, `chosen_ids`, `rejected_ids`: not truncated, which TRL's collator does. As in TRL, the prompt is
      what both rows start with, up to the first token of either completion; `prompt_segments` has its Segments;
    - `other_prompt`: whether the tokens before chosen and before rejected differ;
    - `left_out`: why the pair has no gradient, else empty: TRL would leave it out (TOO_LONG) or use it (EQUAL);
    - `tokens`, `cut`, `longest`: tokens that TRL's collator keeps and removes, and those kept of the longer row;
    - `largest_id`: the largest token id.
    """

    features: ClassVar[Features] = Features(
        {name: List(Value("int32")) for name in ID_COLUMNS}
        | {"prompt_segments": List(Value("int8")), "row": Value("int64"), "other_prompt": Value("bool")}
        | {name: Value("int32") for name in ("tokens", "cut", "longest", "merged", "unwritten", "largest_id")}
        | {"problem": Value("string"), "left_out": Value("string")}
    )

    max_length: int | None = None  # of the two rows, which are not truncated
    pair_length: int | None = None
    """TRL's max_length."""
    truncation_mode: str = "keep_start"

    def key(self) -> tuple[Any, ...]:
        return ("pairs", self.pair_length, self.truncation_mode, *super().key())

    def prepare(self, rows: list[dict[str, Any]], numbers: Sequence[int]) -> pyarrow.Table:
        """Tokenise pairs, column -> value, with their numbers."""
        sequences = [row | {"completion": row[name]} for name in ("chosen", "rejected") for row in rows]
        table = super().prepare(sequences, [*numbers, *numbers])
        joined = map(self._join, table[: len(rows)].to_pylist(), table[len(rows) :].to_pylist())
        return pyarrow.Table.from_pylist(list(joined), schema=self.features.arrow_schema)

    def _join(self, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
        """Join the rows of prompt + chosen and of prompt + rejected."""
        problem = _problem(chosen, rejected)
        ids: list[list[int]] = [[], []] if problem else [row["input_ids"] for row in (chosen, rejected)]
        starts = [0, 0] if problem else [_completion_start(row) for row in (chosen, rejected)]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))
        prompt = min(*starts, shared)
        parts = [kept(len(sequence), self.pair_length, self.truncation_mode) for sequence in ids]
        sequences = [sequence[part] for sequence, part in zip(ids, parts, strict=True)]
        prompts = [max(0, prompt - part.start) for part in parts]
        is_equal = not problem and sequences[0] == sequences[1] and prompts[0] == prompts[1]
        return {
            "prompt_ids": ids[0][:prompt],
            "chosen_ids": ids[0][prompt:],
            "rejected_ids": ids[1][prompt:],
            "prompt_segments": chosen["segments"][:prompt],
            "row": chosen["row"],
            "other_prompt": starts != [prompt, prompt],
            "tokens": sum(map(len, sequences)),
            "cut": sum(map(len, ids)) - sum(map(len, sequences)),
            "longest": max(map(len, sequences)),
            "merged": chosen["merged"] + rejected["merged"],
            "unwritten": chosen["unwritten"] + rejected["unwritten"],
            "largest_id": max(chain(*ids), default=0),
            "problem": problem,
            "left_out": "" if not is_equal else TOO_LONG if prompts[0] >= len(sequences[0]) else EQUAL,
        }


def kept(length: int, pair_length: int | None, truncation_mode: str) -> slice:
    """Return the tokens that TRL's collator keeps of a prompt with a completion, `length` tokens in all."""
    count = min(length, pair_length or length)
    return slice(0, count) if truncation_mode == "keep_start" else slice(length - count, length)


def _completion_start(row: dict[str, Any]) -> int:
    """Index of the first token of the completion, which reaches to the end."""
    segments: list[int] = row["segments"]
    return segments.index(Segment.COMPLETION) if Segment.COMPLETION in segments else len(segments)


def _problem(chosen: dict[str, Any], rejected: dict[str, Any]) -> str:
    """Return why one of the rows cannot be used, or has a weight that DPO would ignore; empty if both are good."""
    problems = {"chosen": chosen["problem"], "rejected": rejected["problem"]}
    if chosen["problem"] == rejected["problem"] != "":
        return str(chosen["problem"])
    for name, row in (("chosen", chosen), ("rejected", rejected)):
        if any(factor != 1 for factor in row["factors"][_completion_start(row) :]):
            problems[name] = "has a message with a weight, which dpo does not use; remove it"
    return "; ".join(f"{name} {text}" for name, text in problems.items() if text)


@dataclass(frozen=True)
class PairStats:
    """Counts of pairs, as DatasetStats (stages.sft.row_filter) has them of rows. Tokens of a prompt count twice."""

    rows: int
    """The sum of the next four."""
    rows_used: int
    rows_bad: int
    rows_too_long: int
    rows_equal: int
    rows_other_prompt: int
    """Pairs, used or not, whose prompt has other tokens before chosen than before rejected."""
    rows_unwritten: int
    tokens: int
    tokens_truncated: int
    tokens_merged: int
    longest: int
    largest_id: int
    rows_without_stop: int
    """Pairs that are used and in whose chosen completion no token stops generation."""


def length_options(stage: DPOStage) -> dict[str, Any]:
    """Return the fields of PairPreparer for a stage."""
    options = stage.train_options
    return {"pair_length": options["max_length"], "truncation_mode": options["truncation_mode"]}


def load_pairs(
    context: Context, part: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int] = frozenset()
) -> PreparedRows:
    """Load the pairs of `part` (`train` or `eval`) of a dpo stage from the cache; prepare them first if needed.

    Args:
        stop_ids: token ids that stop generation; without any, no pair counts as one without them.

    Raises:
        UserError: no pair can be used.
    """
    stage, path = context.config, context.inputs[part].path
    preparer = PairPreparer(tokenizer, **length_options(stage))
    drawn = (stage.seed,) if stage.data.rejected == "other_row" else ()
    prepared, report = load_rows(context, part, preparer, stage.data.rejected, *drawn)
    columns = prepared.remove_columns([*ID_COLUMNS, "prompt_segments"]).with_format("numpy")[:]
    is_used = (columns["left_out"] == "") & (columns["problem"] == "")
    is_left_out, other_prompt = columns["left_out"] != "", columns["row"][columns["other_prompt"]]
    fingerprint = content_key(part, stage.train.model_dump())  # TRL caches the reference's log-probabilities under it
    dataset = prepared.select_columns(list(ID_COLUMNS)).select(is_used.nonzero()[0], new_fingerprint=fingerprint)
    stats = PairStats(
        rows=int(is_used.sum() + is_left_out.sum()) + len(report.dropped),
        rows_used=int(is_used.sum()),
        rows_bad=len(report.dropped),
        rows_too_long=int((columns["left_out"] == TOO_LONG).sum()),
        rows_equal=int((columns["left_out"] == EQUAL).sum()),
        rows_other_prompt=len(other_prompt),
        rows_unwritten=int((columns["unwritten"] > 0).sum()),
        tokens=int(columns["tokens"][is_used].sum()),
        tokens_truncated=int(columns["cut"].sum()),
        tokens_merged=int(columns["merged"].sum()),
        longest=int(columns["longest"][is_used].max(initial=0)),
        largest_id=int(columns["largest_id"][is_used].max(initial=0)),
        rows_without_stop=sum(map(stop_ids.isdisjoint, dataset["chosen_ids"])) if stop_ids else 0,
    )
    if not stats.rows_used:
        raise _nothing_to_learn(part, stats, preparer.pair_length, max(map(len, prepared["prompt_ids"])))
    place = row_place(path, stage.data.reading(part, stage.data.format))
    rows = zip(columns["row"][is_left_out], columns["left_out"][is_left_out], strict=True)
    lines = dropped_rows_text([f"{place(row)}: {reason}" for row, reason in rows], path).splitlines()
    notes = report_notes(report) + date_notes(tokenizer, dataset[0]["prompt_ids"])
    notes += _stats_notes(stats, [str(row) for row in other_prompt])
    return PreparedRows(dataset, stats, report.dropped + lines, notes)


def _nothing_to_learn(part: str, stats: PairStats, max_length: int | None, longest_prompt: int) -> UserError:
    """Return the error for a data set of which no pair is used."""
    reason, remedy, key = EQUAL, "check the rows", f"data.{part}"
    if stats.tokens_truncated:
        remedy, key = "raise train.max_length", "train.max_length"
    if stats.rows_too_long:
        reason = f"{stats.rows_too_long} prompts fill max_length {max_length}, the longest with {longest_prompt} tokens"
    return UserError(f"no pair of the {part} data can be used: {reason}; {remedy}", key)


def _stats_notes(stats: PairStats, other_prompt: list[str]) -> list[str]:
    rows = ", ".join(other_prompt[:MAX_LISTED]) + (", ..." if len(other_prompt) > MAX_LISTED else "")
    counts = {
        f"pairs left out, because {TOO_LONG}; raise train.max_length; {DROPPED_ROWS} lists them": stats.rows_too_long,
        f"pairs left out, because {EQUAL}; {DROPPED_ROWS} lists them": stats.rows_equal,
        "tokens lie beyond max_length and were cut off": stats.tokens_truncated,
        "tokens span the boundary between prompt and completion": stats.tokens_merged,
        "pairs have other prompt tokens before chosen than before rejected, and train on what both start with as the"
        f" prompt: rows {rows}": stats.rows_other_prompt,
        "rows have earlier answers of which the chat template leaves out text, such as reasoning": stats.rows_unwritten,
        "chosen completions have no token that stops generation, so the model does not learn"
        " to stop": stats.rows_without_stop,
    }
    return [f"{count} {text}" for text, count in counts.items() if count]
