"""The best of several points of a training (`select`): each is evaluated, and transformers loads the best one.

A point is the model every `select.every` steps and after the last step. transformers evaluates it on `data.eval`; on
items of a task, BestPoint does. Of two points with the same value, the earlier one is better.
"""

import math
from dataclasses import replace
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from stages.base import Context, UserError
from stages.training.config import TrainingStage, select_key
from stages.training.trainer_internals import TRLTrainer


def metric_name(stage: TrainingStage) -> str:
    """Return the name under which the metric of `select` is logged."""
    assert stage.select is not None
    return f"eval_{stage.select.task}/{stage.select.metric}" if stage.select.task else stage.select.metric


def selection_arguments(stage: TrainingStage) -> dict[str, Any]:
    """Return the arguments of TRL's config for the stage's `select`; none without it."""
    if stage.select is None:
        return {}
    evaluation = {} if stage.select.task else {"eval_strategy": "steps", "eval_steps": stage.select.every}
    return evaluation | {
        "save_strategy": "best",
        "save_total_limit": None,  # Checkpoints deletes them
        "load_best_model_at_end": True,
        "metric_for_best_model": metric_name(stage),
        "greater_is_better": stage.eval_metrics.get(stage.select.metric) == "highest",
    }


class BestPoint(TrainerCallback):
    """Scores and checks the points of a trainer, and says which one is best. Add it after Checkpoints."""

    def __init__(self, trainer: TRLTrainer, context: Context) -> None:
        stage: TrainingStage = context.config
        assert stage.select is not None
        self.trainer, self.select, self.metric = trainer, stage.select, metric_name(stage)
        self.goals = dict(stage.eval_metrics)
        evaluation = stage.evaluation
        self.score = evaluation.load("scorer")(replace(context, config=evaluation)) if evaluation else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.select.check_steps(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the model on the task, and save it if it is the best so far."""
        step = state.global_step
        if self.score is None or (step % self.select.every and step < state.max_steps):
            return
        model: Any = self.trainer.model
        model.eval()  # in train mode, TRL's log would add the metrics of the steps before, which are logged next
        try:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            value, is_higher_better = self.score(base, self.trainer.processing_class)
        except UserError as error:
            raise UserError(str(error), error.key and select_key(error.key)) from None
        self.goals[self.metric] = "highest" if is_higher_better else "lowest"
        should_log = control.should_log
        self.trainer.log({self.metric: value})
        control.should_log = should_log
        model.train()
        best = state.best_metric
        if best is None or (value > best if is_higher_better else value < best):
            state.best_metric, state.best_global_step, control.should_save = value, step, True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        value = metrics.get(self.metric)
        if value is None and self.score is None:
            logged = ", ".join(name for name in metrics if name in self.goals)
            raise UserError(f"the evaluation data have no {self.metric}; name one of {logged}", "select.metric")
        if value is not None and not math.isfinite(value):
            raise UserError(f"step {state.global_step}: {self.metric} is {value}; lower train.learning_rate")

    def result(self) -> dict[str, Any]:
        """Return the metrics `selected_step` and `points`, and a note. Call it before a further evaluation."""
        state, metric = self.trainer.state, self.metric
        points = [{"step": row["step"], metric: row[metric]} for row in state.log_history if metric in row]
        note = (
            f"publishes the model after step {state.best_global_step} of {state.max_steps}: its {metric},"
            f" {state.best_metric:.4g}, is the {self.goals[metric]} of {len(points)} points"
        )
        return {"selected_step": state.best_global_step, "points": points, "notes": [note]}
