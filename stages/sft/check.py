"""Check an `sft` stage before it runs: its rows as training uses them, its weights, and packing."""

from functools import partial

from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings
from stages.data.dataset_cache import load_rows
from stages.data.segments import MAX_TEMPLATE_SHARE, describe_shares, segment_shares
from stages.data.tokenization import Preparer
from stages.models.tokenizer import load_stop_ids
from stages.sft.config import SFTStage
from stages.sft.row_filter import check_rows, data_notes, select
from stages.training.check import PreparedRows, check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    stage: SFTStage = context.config
    has_weight = [weight != 0 for weight in stage.weights.segment_weights]
    findings = check_training(context, on_this_machine, partial(_prepare_rows, context), has_weight)
    options = stage.train.model_dump()
    if any(options.get(name) for name in ("packing", "eval_packing", "padding_free")):
        with findings.part("packing", "train"):
            from stages.sft.packing import check_architecture  # imports TRL, which takes seconds

            check_architecture(context.inputs["model"].path, stage.trust_remote_code)
    if stage.weights.prompt and not stage.weights.completion:
        findings.notes.append(("weights", "completion is 0, so the model learns to write prompts and not answers"))
    for name, weight in stage.weights:
        if weight is not None and weight > 1:
            text = f"{weight:g} is above 1, the paper's largest weight; the loss grows with it"
            findings.notes.append((f"weights.{name}", text))
    return findings


def _prepare_rows(context: Context, split: str, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    stage: SFTStage = context.config
    max_length = stage.train_options["max_length"]
    rows, report = load_rows(context, split, Preparer(tokenizer, max_length, stage.data.turns))
    stop_ids = load_stop_ids(context.inputs["model"].path, tokenizer, stage.trust_remote_code)
    stats = select(rows, stage.weights.segment_weights, stop_ids)[1]
    check_rows(split, stats, max_length, stage.weights.completion)
    notes = data_notes(rows, report, stats, tokenizer)
    shares = segment_shares(stats.weighted)
    if shares.get("template", 0) > MAX_TEMPLATE_SHARE:
        notes.append(describe_shares(shares))
    return PreparedRows(stats.rows_used, stats.longest, stats.largest_id, notes)
