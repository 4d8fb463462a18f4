"""Estimate the cost of a `dpo` stage."""

from stages.estimate.training import estimate as estimate
