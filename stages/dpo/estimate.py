"""Estimate the cost of an `dpo` stage."""

from stages.estimate.training import estimate

__all__ = ["estimate"]
