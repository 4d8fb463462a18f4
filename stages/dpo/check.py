"""Check a `dpo` stage before it runs, with the tokens of its pairs."""

from stages.base import Context, Findings
from stages.dpo.pairs import load_pairs
from stages.training.check import check_training


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    settings = context.config.seed, context.config.train_options["truncation_mode"]
    return check_training(context, on_this_machine, load_pairs, settings)
