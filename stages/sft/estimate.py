"""Cost of an `sft` stage."""

from stages.estimate.result import Estimate, EstimateInputs
from stages.estimate.training import estimate_training
from stages.sft.config import SFTStage


def estimate(stage: SFTStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a stage."""
    return estimate_training(stage, inputs)
