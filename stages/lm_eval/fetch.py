"""Fetch what benchmarks read: the data sets that their tasks name, metrics and word lists."""

from __future__ import annotations

from pathlib import Path

from stages.lm_eval.code_permission import only_trusted_code
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.tasks import load_benchmarks


def fetch(config: LMEvalStage, paths: dict[str, Path], scratch: Path) -> list[str]:
    """Build every task as a run does, by which lm-eval, datasets, evaluate and nltk fill their caches; the tasks' names
    with the data sets that they read. Raises UserError."""
    with only_trusted_code(config):
        benchmarks = load_benchmarks(config, paths, scratch)
    found: dict[str, str] = {}
    for benchmark in benchmarks:
        for task in benchmark.tasks.values():
            name = str(task.config.dataset_path or "")
            own = benchmark.config.data or benchmark.config.dataset
            found[benchmark.config.task] = "the recipe's own files" if own or not name else f"data set {name}"
    return [f"task {task}: {what}" for task, what in found.items()]
