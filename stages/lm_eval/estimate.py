"""Estimate the cost of a `lm_eval` stage."""

from stages.estimate.evaluation import estimate

__all__ = ["estimate"]
