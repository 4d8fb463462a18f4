"""Requests of a `judge` stage without the judge's part, which --plan shows."""

from stages.estimate.result import EstimateInputs
from stages.evaluation.estimate import Request
from stages.judge.config import JudgeStage
from stages.judge.questions import read_instructions, read_questions


def requests(stage: JudgeStage, inputs: EstimateInputs) -> list[Request]:
    """A request for each turn; a second turn repeats the first and its answer."""
    limit, tokens = stage.options.limit, stage.options.max_new_tokens
    questions = read_questions(inputs.paths, limit) if stage.mt_bench else []
    instructions = read_instructions(inputs.paths, limit) if stage.alpaca_eval else []
    texts = [*(each.instruction for each in instructions), *(question.turns[0] for question in questions)]
    second_turns = [Request(" ".join(question.turns), 2 * tokens) for question in questions]
    return [*(Request(text, tokens) for text in texts), *second_turns]
