"""Check a `dpo` stage before it runs, with the tokens of its pairs."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings
from stages.data.tokenization import prepare
from stages.dpo.config import DPOStage
from stages.training.check import PreparedRows, check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    return check_training(context, on_this_machine, partial(_prepare_rows, context), context.config.seed)


def _prepare_rows(context: Context, split: str, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    stage: DPOStage = context.config
    path, max_length = context.inputs[split].path, stage.train_options["max_length"]
    pairs = [(number, pair.columns()) for number, pair in stage.rows(path, split)]
    prepared = []
    for answer in ("chosen", "rejected"):
        texts = [{"row": number, "prompt": pair["prompt"], "completion": pair[answer]} for number, pair in pairs]
        prepared.append(prepare(Dataset.from_list(texts), tokenizer, None, place=f"{path}:")["input_ids"])
    longest = max(len(ids) for answers in prepared for ids in answers)
    largest_id = max(max(ids) for answers in prepared for ids in answers)
    return PreparedRows(len(pairs), min(longest, max_length or longest), largest_id)
