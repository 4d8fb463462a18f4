"""Requests of a `sensitivity` stage."""

from stages.estimate.result import EstimateInputs
from stages.evaluation.estimate import Request
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.sets import read_sets


def requests(stage: SensitivityStage, inputs: EstimateInputs) -> list[Request]:
    """Each prompt is answered, and scored with all answers of its set."""
    requests, system = [], stage.options.system_instruction
    for entry in stage.prompts:
        for group in read_sets(entry, inputs.paths, stage.seed):
            texts, tokens = [prompt.text(system) for prompt in group.prompts], entry.max_new_tokens
            requests += [Request(text, tokens, len(texts) * tokens) for text in texts]
    return requests
