"""Scores models in memory on a benchmark, for a training that chooses the best of its points."""

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.inference.engine import Engine
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.model import EngineLM
from stages.lm_eval.results import score_rows
from stages.lm_eval.stage import evaluate_model, limit_filters
from stages.lm_eval.tasks import load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code

Score = Callable[[PreTrainedModel, PreTrainedTokenizerBase], tuple[float, bool]]


def scorer(context: Context) -> Score:
    """Load the stage's task, and return a function that scores a model on it and leaves the model as it was.

    The function returns the task's headline score, a mean over those of a tag's tasks, and whether a higher one is
    better. Raises UserError.
    """
    config: LMEvalStage = context.config
    files = {name: source.path for name, source in context.inputs.items() if name != "model"}
    with only_trusted_code(config):
        benchmarks = load_benchmarks(config, files, context.scratch)
    for task in benchmarks[0].tasks.values():
        limit_filters(task)

    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, bool]:
        generation_config, is_training = model.generation_config, model.training
        try:
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with only_trusted_code(config), torch.random.fork_rng(devices):  # lm-eval seeds torch
                engine = Engine(copy.deepcopy(tokenizer), model, config.models[0])
                evaluation = evaluate_model(config, benchmarks, EngineLM(engine, config, lambda count: None), Path())
        finally:
            model.generation_config = generation_config
            model.train(is_training)
        assert evaluation is not None, "a training that chooses by a task has one process"
        rows = [row for row in score_rows(evaluation[0], benchmarks) if row.headline]
        values = [row.value for row in rows if row.value is not None]
        if len(values) < len(rows) or not rows:
            raise UserError(f"{config.tasks[0].task} has no score on these items; name others", "tasks.0.task")
        return fmean(values), rows[0].higher_is_better is not False

    return score
