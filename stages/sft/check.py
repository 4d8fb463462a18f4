"""Check an `sft` stage before it runs: its rows as training uses them, its weights, and packing."""

from transformers import PreTrainedTokenizerBase

from stages.base import Context, Findings
from stages.data.dataset_cache import PreparedRows, load_rows
from stages.data.segments import MAX_TEMPLATE_SHARE, describe_shares
from stages.data.tokenization import Preparer
from stages.sft.config import SFTStage
from stages.sft.row_filter import check_rows, describe_rows, select
from stages.training.check import check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    stage: SFTStage = context.config
    has_weight = [weight != 0 for weight in stage.weights.segment_weights]
    findings = check_training(context, on_this_machine, _prepare_rows, has_weight)
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


def _prepare_rows(context: Context, split: str, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> PreparedRows:
    stage: SFTStage = context.config
    max_length = stage.train_options["max_length"]
    rows, report = load_rows(context, split, Preparer(tokenizer, max_length, stage.data.turns))
    stats = select(rows, stage.weights.segment_weights, stop_ids)[1]
    check_rows(split, stats, max_length, stage.weights.completion)
    prepared = describe_rows(rows, report, stats, tokenizer)
    if stats.weighted_share.get("template", 0) > MAX_TEMPLATE_SHARE:
        prepared.notes.append(describe_shares(stats.weighted_share))
    return prepared
