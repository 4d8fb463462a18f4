"""Estimate the cost of a `sensitivity` stage."""

from stages.estimate.evaluation import estimate

__all__ = ["estimate"]
