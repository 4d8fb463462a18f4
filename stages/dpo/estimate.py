"""Cost of a `dpo` stage."""

from stages.dpo.config import DPOStage
from stages.estimate.result import Estimate, EstimateInputs
from stages.estimate.training import estimate_training


def estimate(stage: DPOStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a stage."""
    return estimate_training(stage, inputs, has_reference=True)
