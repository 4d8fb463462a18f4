"""Estimate the cost of a `judge` stage."""

from stages.estimate.evaluation import estimate

__all__ = ["estimate"]
