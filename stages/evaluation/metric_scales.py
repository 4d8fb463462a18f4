"""Which metrics are shares, from their definitions: metric_scales.yaml. Values never decide it."""

from functools import cache
from pathlib import Path

import yaml


@cache
def _scales() -> dict[str, float]:
    lists = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: float(scale) for scale, names in lists.items() for name in names}


def share_scale(task: str, metric: str) -> float | None:
    """Return the value of a perfect score of a metric that is a share; None for a metric that is none, or not known."""
    return _scales().get(f"{task}/{metric}", _scales().get(metric))
