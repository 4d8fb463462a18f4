"""Score rows and sample files in the format of the lm_eval stage, for stages that score without lm-eval."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from stages.records.metrics import ScoreRow

_SCALES = yaml.safe_load(Path(__file__).with_name("metric_scales.yaml").read_text(encoding="utf-8"))
SCALES = {name: float(scale) for scale, names in _SCALES.items() for name in names}
"""Metric, or task/metric -> the value of a perfect score, for metrics that are shares. Values never decide it."""


def share_scale(task: str, metric: str) -> float | None:
    """Return the value of a perfect score of a metric that is a share; None for a metric that is none, or not known."""
    return SCALES.get(f"{task}/{metric}", SCALES.get(metric))


def score_row(
    task: str,
    metric: str,
    values: Sequence[float],
    items: Sequence[float],
    headline: bool = False,
    higher_is_better: bool | None = True,
) -> ScoreRow:
    """Average `values` into one row; the standard error is that of the mean of `items`, one number per item."""
    return ScoreRow(
        task=task,
        metric=metric,
        filter="none",
        value=statistics.fmean(values) if values else None,
        stderr=statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None,
        n=len(items),
        headline=headline,
        higher_is_better=higher_is_better,
    )


def write_samples(samples: Iterable[dict[str, Any]], file: Path) -> None:
    """Write one line per item. The report pairs two models' items by the hash of `prompts`."""
    with file.open("w", encoding="utf-8") as lines:
        for number, sample in enumerate(samples):
            digest = hashlib.sha256(json.dumps(sample["prompts"]).encode()).hexdigest()
            head = {"doc_id": number, "doc_hash": digest, "filter": "none"}
            lines.write(json.dumps(head | sample, ensure_ascii=False) + "\n")


def counter(progress: Callable[[int, int, str], None], total_of: Callable[[], int], note: str) -> Callable[[int], None]:
    """Return a function that adds a number of answers to the count, and reports about 100 times in all.

    Args:
        total_of: returns the number of all answers, once there is a first one.
    """
    done = total = 0

    def add(count: int) -> None:
        nonlocal done, total
        total = total or total_of()
        before, done = done, done + count
        interval = max(1, total // 100)
        if done == total or done // interval > before // interval:
            progress(done, total, note)

    return add
