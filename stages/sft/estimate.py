"""Estimate the cost of an `sft` stage."""

from stages.estimate.training import estimate

__all__ = ["estimate"]
