"""Cost of a `sensitivity` stage."""

from stages.estimate.evaluation import Request, estimate_evaluation
from stages.estimate.result import Estimate, EstimateInputs
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.sets import read_sets


def estimate(stage: SensitivityStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a stage: each prompt is answered, and scored with all answers of its set."""

    def read_requests() -> list[Request]:
        requests, system = [], stage.options.system_instruction
        for entry in stage.prompts:
            for group in read_sets(entry, inputs.paths, stage.seed):
                texts, tokens = [prompt.text(system) for prompt in group.prompts], entry.max_new_tokens
                requests += [Request(text, tokens, len(texts) * tokens) for text in texts]
        return requests

    return estimate_evaluation(stage, inputs, read_requests)
