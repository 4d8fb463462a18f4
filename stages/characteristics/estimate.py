"""Estimate the cost of a `characteristics` stage."""

from stages.estimate.evaluation import estimate

__all__ = ["estimate"]
