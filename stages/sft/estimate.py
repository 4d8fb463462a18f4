"""Cost of an `sft` stage."""

from stages.estimate.training import estimate_training as estimate

__all__ = ["estimate"]
