"""The `search` section of a recipe: successive halving over the cells of its matrix.

    search:
      stage: wit                      # the training to shorten
      over: [prompt, completion]      # the axes to search; each combination of the other axes has its own search

All candidates first train for a small share of the stage's training. The best ones train for a larger share, and so on
up to the full training (Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter
Optimization*, 2016). pipeline.plan.search plans the steps.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

from pydantic import Field

from stages.base import Config


class Halving(Config):
    """Successive halving: selects the cells that train in full."""

    stage: str
    """The training to shorten. Only the cells that reach the last rung train in full and are benchmarked."""
    over: list[str] = Field(default_factory=list)
    """The axes of the matrix to search; an empty list means all. Each combination of the other axes has its own
    search."""
    metric: str | None = None
    """The metric of the stage on data.eval that ranks the candidates. None: eval_completion_loss for sft, eval_loss
    for dpo."""
    factor: int = Field(default=4, ge=2, le=100)
    """Each rung keeps the best 1/factor of the candidates and trains them factor times as long."""
    rungs: int = Field(default=3, ge=2, le=10)
    """Number of training lengths, including the full one."""

    @property
    def lengths(self) -> list[Fraction]:
        """Share of the full training on each rung; the last is 1."""
        return [Fraction(1, self.factor**power) for power in reversed(range(self.rungs))]

    def survivors(self, candidates: int) -> int:
        """Return how many of `candidates` reach the next rung."""
        return max(1, math.ceil(candidates / self.factor))


def rank(values: Mapping[str, float], goal: str) -> list[str]:
    """Sort the candidates, best first, ties in their order. `goal` is `lowest` or `highest`."""
    return sorted(values, key=lambda candidate: values[candidate], reverse=goal == "highest")


def search_cost(candidates: int, halving: Halving) -> Fraction:
    cost = Fraction(0)
    for length in halving.lengths:
        cost, candidates = cost + candidates * length, halving.survivors(candidates)
    return cost
