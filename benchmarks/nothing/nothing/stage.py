"""Run a `nothing` stage."""

from stages.base import Context
from stages.records.metrics import Metrics


def run(context: Context) -> Metrics:
    """Publish one empty file."""
    (context.out / "nothing").touch()
    return Metrics()
