"""Cost of a `judge` stage without the judge's part, which --plan shows."""

from stages.estimate.evaluation import Request, estimate_evaluation
from stages.estimate.result import Estimate, EstimateInputs
from stages.judge.config import JudgeStage
from stages.judge.questions import read_instructions, read_questions


def estimate(stage: JudgeStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of a stage: a request for each turn; a second turn repeats the first and its answer."""

    def read_requests() -> list[Request]:
        limit, tokens = stage.options.limit, stage.options.max_new_tokens
        questions = read_questions(inputs.paths, limit) if stage.mt_bench else []
        instructions = read_instructions(inputs.paths, limit) if stage.alpaca_eval else []
        texts = [*(each.instruction for each in instructions), *(question.turns[0] for question in questions)]
        second_turns = [Request(" ".join(question.turns), 2 * tokens) for question in questions]
        return [*(Request(text, tokens) for text in texts), *second_turns]

    return estimate_evaluation(stage, inputs, read_requests)
