"""The best of several points of a training (`select`): transformers evaluates and saves them, and loads the best one.

A point is the model every `select.every` steps and after the last step. Of two points with the same value, the earlier
one is better.
"""

import math
from typing import Any

from transformers import TrainerCallback

from stages.base import UserError
from stages.training.config import TrainingStage
from stages.training.trainer_internals import TRLTrainer


def selection_arguments(stage: TrainingStage) -> dict[str, Any]:
    """Return the arguments of TRL's config for the stage's `select`; none without it."""
    if stage.select is None:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": stage.select.every,
        "save_strategy": "best",
        "save_total_limit": None,  # Checkpoints deletes them
        "load_best_model_at_end": True,
        "metric_for_best_model": stage.select.metric,
        "greater_is_better": stage.eval_metrics[stage.select.metric] == "highest",
    }


class BestPoint(TrainerCallback):
    """Checks the points of a trainer, and says which one is best."""

    def __init__(self, trainer: TRLTrainer, stage: TrainingStage) -> None:
        assert stage.select is not None
        self.trainer, self.select, self.eval_metrics = trainer, stage.select, stage.eval_metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.select.check_steps(state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        value = metrics.get(self.select.metric)
        if value is None:
            logged = ", ".join(name for name in metrics if name in self.eval_metrics)
            raise UserError(f"the evaluation data have no {self.select.metric}; name one of {logged}", "select.metric")
        if not math.isfinite(value):
            raise UserError(f"step {state.global_step}: {self.select.metric} is {value}; lower train.learning_rate")

    def result(self) -> dict[str, Any]:
        """Return the metrics `selected_step` and `points`, and a note. Call it before a further evaluation."""
        state, metric = self.trainer.state, self.select.metric
        points = [{"step": row["step"], metric: row[metric]} for row in state.log_history if metric in row]
        note = (
            f"publishes the model after step {state.best_global_step} of {state.max_steps}: its {metric},"
            f" {state.best_metric:.4g}, is the {self.eval_metrics[metric]} of {len(points)} points"
        )
        return {"selected_step": state.best_global_step, "points": points, "notes": [note]}
