"""Download what the benchmarks of an lm_eval stage read: data sets, metrics and word lists."""

from pathlib import Path

from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.tasks import load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code


def fetch(config: LMEvalStage, paths: dict[str, Path], scratch: Path) -> list[str]:
    """Load every task as a run does, which fills all caches; return a line per task with its data set."""
    with only_trusted_code(config):
        benchmarks = load_benchmarks(config, paths, scratch)
    sources: dict[str, str] = {}
    for benchmark in benchmarks:
        for task in benchmark.tasks.values():
            dataset = str(task.config.dataset_path or "")
            is_replaced = benchmark.config.data or benchmark.config.dataset
            source = f"data set {dataset}" if dataset and not is_replaced else "the recipe's own files"
            sources[benchmark.config.task] = source
    return [f"task {task}: {source}" for task, source in sources.items()]
