"""Evaluate one model on the recipe's benchmarks with lm-eval's `simple_evaluate`. Scores are lm-eval's, unchanged."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the value that lm-eval's command sets
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap without a fork, which can hang in a process with threads

import lm_eval
from accelerate.utils import gather_object
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import sanitize_model_name
from torch.utils import collect_env

from stages.base import Context, UserError
from stages.evaluation.score_rows import counter
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.model import EngineLM, load_model
from stages.lm_eval.results import dump, score_rows, task_hashes, without_paths, write_samples
from stages.lm_eval.tasks import Benchmark, load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code
from stages.models.generation_config import NOT_USED, describe
from stages.records.metrics import Metrics
from stages.system.limits import LimitExceeded, limited

VOLATILE = ("git_hash", "date", "start_time", "end_time", "total_evaluation_time_seconds", "pretty_env_info")
"""Keys that differ between two equal evaluations, left out of results.json: stage.json has the time and the machine,
and the hash is of whatever repository the current folder lies in."""

FILTER_SECONDS, FILTER_SECONDS_PER_ITEM = 30.0, 0.1
"""Time for the filters of a task: a thousand times what they need."""


def run(context: Context) -> Metrics:
    """Evaluate the input `model`; write results.json and a sample file per task. Only the first process has metrics."""
    config: LMEvalStage = context.config
    start = time.monotonic()
    path = context.inputs["model"].path
    context.progress(0, 1, "reading tasks")
    files = {key: item.path for key, item in context.inputs.items() if key != "model"}
    with only_trusted_code(config):
        benchmarks = load_benchmarks(config, files, context.scratch)
        tasks = [task for benchmark in benchmarks for task in benchmark.tasks.values()]
        for task in tasks:
            limit_filters(task)
        context.progress(0, 1, f"loading {config.models[0]}")
        on_answers = counter(
            context.progress, lambda: sum(request.repeats for task in tasks for request in task.instances), "requests"
        )
        model = load_model(path, config, context.checkpoints, on_answers)
        evaluation = evaluate_model(config, benchmarks, model, path)
        truncated = Counter(task for task, _ in set().union(*gather_object([model.truncated])))
    if evaluation is None:
        return Metrics()
    results, samples = evaluation
    rows = score_rows(results, benchmarks)
    stable = {key: value for key, value in results.items() if key not in VOLATILE}
    text = without_paths(dump(stable, indent=2), _portable_names(config, context))
    (context.out / "results.json").write_text(text, encoding="utf-8")
    sample_files = write_samples(samples, context.out) if config.options.log_samples else {}
    return Metrics(
        results=rows,
        seconds=round(time.monotonic() - start, 3),
        versions=results["versions"],
        num_fewshot=results["n-shot"],
        samples=sample_files,
        notes=describe(f"{config.models[0]}: {NOT_USED}", model.engine.removed_defaults)
        + model.engine.notes()
        + [
            f"{task}: {count} of {results['results'][task]['sample_len']} items are longer than the model takes "
            f"({model.max_length} tokens): lm-eval cut them from the left, and their scores are of less than was asked"
            for task, count in sorted(truncated.items())
        ],
        environment=_environment(config, model, results),
    )


def limit_filters(task: Any) -> None:
    """End with a UserError if a filter of lm-eval's `task`, a pattern for the most part, hangs on an answer."""
    apply_filters = task.apply_filters

    def apply() -> Any:
        try:
            with limited(FILTER_SECONDS + FILTER_SECONDS_PER_ITEM * len(task.instances)):
                return apply_filters()
        except LimitExceeded as error:
            raise UserError(f"a filter of {task.config.task} {error} on the answers; repair its pattern") from None

    task.apply_filters = apply


def _environment(config: LMEvalStage, model: EngineLM, results: dict[str, Any]) -> dict[str, Any]:
    own = {"backend": config.options.backend, "engine": config.options.engine, "processes": model.world_size}
    return model.engine.environment() | own | {"lm_eval": results["lm_eval_version"], "max_length": model.max_length}


@contextlib.contextmanager
def _without_environment_report() -> Iterator[None]:
    """Keep lm-eval from asking pip and the compilers about the machine for a second; the answer is VOLATILE."""
    report = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = str
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = report


@_without_environment_report()
def evaluate_model(
    config: LMEvalStage, benchmarks: list[Benchmark], model: EngineLM, path: Path
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """Results as lm-eval's command would save them, and samples by task; None in every process except the first."""
    options = config.options
    other_seed = DEFAULT_OTHER_SEED if config.seed is None else config.seed
    tracker = EvaluationTracker()
    results: Any = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(path), "dtype": options.dtype},  # for the record only
        tasks=[part for benchmark in benchmarks for part in benchmark.parts],
        task_manager=TaskManager(include_defaults=False),  # the default reads 14,000 task files, which are not needed
        device=str(model.device),
        limit=options.limit,
        bootstrap_iters=options.bootstrap_iters,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        log_samples=True,  # the task hashes need them
        evaluation_tracker=tracker,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.multiturn,
        gen_kwargs=options.gen_kwargs.model_dump() or None,
        random_seed=DEFAULT_RANDOM_SEED if config.seed is None else config.seed,
        numpy_random_seed=other_seed,
        torch_random_seed=other_seed,
        fewshot_random_seed=other_seed,
    )
    if results is None:
        return None
    samples = results.pop("samples")
    results["task_hashes"] = task_hashes(samples)
    results.update(asdict(tracker.general_config_tracker))
    results["model_source"] = options.backend
    return results, samples


def _portable_names(config: LMEvalStage, context: Context) -> dict[str, str]:
    needs = config.needs()
    pairs = [(item.path, needs[key].value) for key, item in context.inputs.items() if key in needs]
    names = {str(path): name for path, name in pairs} | {str(path.resolve()): name for path, name in pairs}
    names |= {sanitize_model_name(path): sanitize_model_name(name) for path, name in names.items()}
    names |= {str(context.scratch): "scratch", str(context.scratch.resolve()): "scratch"}
    return names | {str(Path(lm_eval.__file__).parent): "lm_eval"}
