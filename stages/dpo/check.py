"""Check a `dpo` stage before it runs, with the tokens of its pairs."""

from functools import partial

from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings
from stages.dpo.pairs import load_pairs
from stages.models.tokenizer import load_stop_ids
from stages.training.check import PreparedRows, check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    settings = context.config.seed, context.config.train_options["truncation_mode"]
    return check_training(context, on_this_machine, partial(_prepare_rows, context), settings)


def _prepare_rows(context: Context, split: str, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    stop_ids = load_stop_ids(context.inputs["model"].path, tokenizer, context.config.trust_remote_code)
    pairs = load_pairs(context, split, tokenizer, stop_ids)
    return PreparedRows(pairs.stats.rows_used, pairs.stats.longest, pairs.stats.largest_id, pairs.notes)
