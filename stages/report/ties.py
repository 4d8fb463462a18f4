"""One comparison of scores, for best, above, equal and ranks."""

from __future__ import annotations


def rounded(value: float) -> float:
    """Return a score to 12 significant digits and at most 12 decimals: scores that agree in these are equal.

    Equal sums of shares differ in their last bits: half of all sums of two k / 50 have several floating-point values.
    """
    return round(float(f"{value:.12g}"), 12)
