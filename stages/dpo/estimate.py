"""Estimate the cost of a `dpo` stage."""

from stages.estimate.training import estimate

__all__ = ["estimate"]
