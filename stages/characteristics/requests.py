"""Requests of a `characteristics` stage."""

from stages.characteristics.config import CharacteristicsStage
from stages.estimate.result import EstimateInputs
from stages.evaluation.estimate import Request


def requests(stage: CharacteristicsStage, inputs: EstimateInputs) -> list[Request]:
    """Each row is read once."""
    rows = (row for entry in stage.sets for row in stage.rows(entry, inputs.paths[f"data.{entry.name}"]))
    return [Request(" ".join(map(str, row.columns().values()))) for row in rows]
