"""Measure the standard error of AlpacaEval's length-controlled win rate, and how long it takes.

    python -m benchmarks.length_control [INSTRUCTIONS] [RESAMPLES]

A judge that prefers the longer output somewhat more often than not judges INSTRUCTIONS (805 by default, as AlpacaEval
has) outputs of random length. Prints the package's own error, ours over RESAMPLES (1,000) fits, the deviation of the
win rate over 40 judgings of other random instructions, which is what both should be, and the seconds of the fits.
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from stages.judge import alpaca_eval
from stages.judge.config import AlpacaEval

DRAWS = 40
"""Sets of other instructions."""
GLM = "length_controlled_minimal"


def annotations(count: int, seed: int) -> list[alpaca_eval.Annotation]:
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        lengths = [draw.randint(100, 2000) for _ in range(2)]
        chance = 1 / (1 + math.exp(-(lengths[1] - lengths[0]) / 800))
        outputs = {f"output_{i}": "x" * length for i, length in enumerate(lengths, 1)}
        rows.append({"index": index, "preference": 2.0 if draw.random() < chance else 1.0} | outputs)
    return rows


def main(count: int, resamples: int) -> None:
    """Judge, fit and print."""
    alpaca_eval.RESAMPLES = resamples
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    print(f"{count} instructions, {resamples} resamples")
    rows = annotations(count, 0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        start = time.perf_counter()
        scores = alpaca_eval.score(AlpacaEval(instructions="-"), rows, None, scratch, 23, lambda *_: None)
        seconds = time.perf_counter() - start
        rates = []
        for seed in range(1, DRAWS + 1):
            frame = pd.DataFrame(annotations(count, seed)).assign(**alpaca_eval.GENERATORS)
            fit = alpaca_eval.fit_length_control(frame, GLM, scratch / "df_gamed.csv")
            rates += [fit[0]["length_controlled_winrate"]] if fit else []
        frame = pd.DataFrame(rows).assign(**alpaca_eval.GENERATORS)
        fit = alpaca_eval.fit_length_control(frame, GLM, scratch / "df_gamed.csv")
    row = next(row for row in scores.rows if row.metric == "length_controlled_winrate")
    print(f"length-controlled win rate {100 * (row.value or 0):.1f}")
    print(f"error by the package       {fit[0]['lc_standard_error'] if fit else math.nan:.2f}")
    print(f"error over resamples       {100 * (row.stderr or 0):.2f}")
    print(f"deviation over other sets  {statistics.stdev(rates):.2f}")
    print(f"seconds                    {seconds:.0f}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:] or ("805", "1000")))
