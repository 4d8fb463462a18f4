"""Cost of a `characteristics` stage."""

from stages.characteristics.config import CharacteristicsStage
from stages.estimate.evaluation import Request, estimate_evaluation
from stages.estimate.result import Estimate, EstimateInputs


def estimate(stage: CharacteristicsStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a stage, which reads every row once."""

    def read_requests() -> list[Request]:
        rows = (row for entry in stage.sets for row in stage.rows(entry, inputs.paths[f"data.{entry.name}"]))
        return [Request(" ".join(map(str, row.columns().values()))) for row in rows]

    return estimate_evaluation(stage, inputs, read_requests)
