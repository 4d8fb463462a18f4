"""Check a `dpo` stage before it runs, with the tokens of its pairs."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings
from stages.dpo.pairs import load_pairs
from stages.training.check import PreparedRows, check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    settings = context.config.seed, context.config.train_options["truncation_mode"]
    return check_training(context, on_this_machine, partial(_prepare_rows, context), settings)


def _prepare_rows(context: Context, split: str, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    stats = load_pairs(context, split, tokenizer).stats
    return PreparedRows(stats.rows_used, stats.longest, stats.largest_id)
