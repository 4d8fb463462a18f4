"""Check an `lm_eval` stage before it runs: its model, and every task with its data, metric and few-shot examples."""

from __future__ import annotations

from stages.base import Context, Findings
from stages.evaluation.check import check_model
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.tasks import load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code

_CHECKED: dict[str, Findings] = {}
"""Settings and files of tasks -> what was found: the steps of a stage differ in their models only."""


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. Tasks whose data set is on the hub download it, as the run would."""
    config: LMEvalStage = context.config
    files = {name: source.path for name, source in context.inputs.items() if name != "model"}
    key = repr((config.model_copy(update={"models": []}).model_dump_json(), files))
    if key not in _CHECKED:
        shared = _CHECKED[key] = Findings()
        with shared.part("metrics", "tasks"), only_trusted_code(config):
            load_benchmarks(config, files, context.scratch, shared.part)
    findings = _CHECKED[key].model_copy(deep=True)
    check_model(context, findings)
    return findings
