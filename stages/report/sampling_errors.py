"""Standard errors of scores, of their averages and of their differences, over the items that they share.

A score is a mean over items, or a weighted sum of such means. Its residuals say what each item adds to it: an item with
the values x of n in all has sum(x - mean) / n * sqrt(G / (G - 1)), where G is the number of items. The residuals of a
weighted sum of scores are the weighted sums of theirs, item by item, and its standard error is the root of the sum of
their squares (items are clusters: Liang and Zeger, 1986). So scores over the same items are paired, and scores over
other items are independent. For one mean it is stdev / sqrt(n); for the difference of two models over the same items,
the same of the items' differences.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ItemValues = Mapping[str, list[float]]
"""doc_hash -> the values of that item: several if it was asked repeatedly."""
Source = tuple[str, int]
"""What a residual without an item is from, and the number of items behind it."""
Residuals = Mapping[str | tuple[Source, int], float]
"""doc_hash, or a source and a number within it -> residual. The sum of their squares is the squared standard error."""


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, in the same unit."""

    value: float
    stderr: float | None
    """None if it is not known."""
    n: int | None = None
    """Number of items that the error rests on; None if it is not known."""

    @property
    def is_constant(self) -> bool:
        """Whether the error is 0 because all items agree, which says nothing about items that were not asked."""
        return self.stderr is not None and self.stderr < TOLERANCE


TOLERANCE = 1e-12
"""Residuals of equal values differ from 0 by rounding alone."""


def rounded(value: float) -> float:
    """Return a score to 12 significant digits and at most 12 decimals: scores that agree in these are equal.

    Equal sums of shares differ in their last bits: half of all sums of two k / 50 have several floating-point values.
    """
    return round(float(f"{value:.12g}"), 12)


def with_error(value: float, residuals: Residuals | None) -> Estimate:
    """Return a number with the standard error of its residuals."""
    if residuals is None:
        return Estimate(value, None)
    sources = {key[0] for key in residuals if not isinstance(key, str)}
    n = sum(isinstance(key, str) for key in residuals) + sum(count for _, count in sources)
    return Estimate(value, math.hypot(*residuals.values()), n)


def weighted_sum(terms: Iterable[tuple[float, Residuals | None]]) -> Residuals | None:
    """Return the residuals of a sum of weight * score; None if those of a score are unknown."""
    total: dict[str | tuple[Source, int], float] = {}
    for weight, residuals in terms:
        if residuals is None:
            return None
        for key, residual in residuals.items():
            total[key] = total.get(key, 0.0) + weight * residual
    return total


def residuals_of_items(items: ItemValues) -> Residuals | None:
    """Return the residuals of the mean of all values; None for fewer than two items."""
    values = [value for repeats in items.values() for value in repeats]
    if len(items) < 2:
        return None
    mean, factor = fmean(values), math.sqrt(len(items) / (len(items) - 1)) / len(values)
    return {item: factor * math.fsum(value - mean for value in repeats) for item, repeats in items.items()}


def residuals_of_error(source: str, stderr: float | None, n: int) -> Residuals | None:
    """Return the residual of a score of which only the standard error is known: it shares no item with another."""
    return None if stderr is None else {((source, n), 0): stderr}


def residuals_of_resamples(values: list[float], items: str, n: int) -> Residuals:
    """Return the residuals of a score that was computed again on resamples of its n items; `items` identifies them.

    Two scores share them if they were computed on the same resamples of the same items.
    """
    mean = fmean(values)
    return {((items, n), i): (value - mean) / math.sqrt(len(values) - 1) for i, value in enumerate(values)}


def read_items(path: Path, metric: str, filter_name: str) -> ItemValues:
    """Read the values of single items from a sample file; empty if an item has a value that is no number.

    An item that was not scored, whose value is null, has none.
    """
    items: dict[str, list[float]] = {}
    if not path.is_file():
        return items
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") != filter_name:
                continue
            value = sample.get("repeats", {}).get(metric, sample.get(metric))
            values = value if "repeats" in sample and isinstance(value, list) else [value]
            scored = [each for each in values if each is not None]
            if metric not in sample or not all(isinstance(each, int | float) for each in scored):
                return {}
            items.setdefault(str(sample.get("doc_hash") or f"{path} {sample['doc_id']}"), []).extend(map(float, scored))
    return {item: values for item, values in items.items() if values}
