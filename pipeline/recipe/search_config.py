"""The `search` of a recipe: successive halving over the cells of its matrix, in numbers.

    search:
      stage: wit                      # the training that is shortened
      over: [prompt, completion]      # the axes to choose on; for each combination of the others there is one search

All candidates train for a small part of the stage's training; the better ones of these for a larger part, and so on up
to the whole (Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter Optimization*, 2016).
How its steps are planned and run is said in pipeline.search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

from pydantic import Field

from stages.base import Config

Candidate = TypeVar("Candidate")


class Halving(Config):
    """How the cells to train in full are chosen."""

    stage: str
    """The training to shorten. Only the cells that are left at the end train in full, and only they are benchmarked."""
    over: list[str] = Field(default_factory=list)
    """The axes of the matrix to choose on; none named: all. For each combination of the others there is a search of
    its own."""
    metric: str | None = None
    """The metric of the stage, measured on its data.eval, by which candidates are compared. None: eval_completion_loss
    for sft, eval_loss for dpo."""
    factor: int = Field(default=4, ge=2, le=100)
    """From one rung to the next the best 1/factor of the candidates train factor times as long."""
    rungs: int = Field(default=3, ge=2, le=10)
    """How many lengths of training there are, the whole one among them."""

    @property
    def lengths(self) -> list[Fraction]:
        """The part of the whole training on each rung, the last being 1."""
        return [Fraction(1, self.factor**below) for below in reversed(range(self.rungs))]

    def kept(self, candidates: int) -> int:
        """How many of so many go on."""
        return max(1, math.ceil(candidates / self.factor))


def ranked(values: Mapping[Candidate, float], goal: str) -> list[Candidate]:
    """The candidates, best first; of equal ones the earlier first. `goal` is `lowest` or `highest`."""
    return sorted(values, key=lambda candidate: values[candidate], reverse=goal == "highest")


def trainings(candidates: int, halving: Halving) -> Fraction:
    """What a search over so many costs, in whole trainings."""
    cost = Fraction(0)
    for length in halving.lengths:
        cost, candidates = cost + candidates * length, halving.kept(candidates)
    return cost
