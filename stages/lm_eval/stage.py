"""Run one model on the recipe's benchmarks, in this process, through lm-eval's `simple_evaluate`.

Scores are lm-eval's to the last digit: this file only chooses, records and translates.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as lm-eval's command sets it
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval forks to resample; beside torch's threads that can hang

import lm_eval
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import sanitize_model_name

from stages.base import Context
from stages.lm_eval.code_permission import only_trusted_code
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.model import HFModel, KeepingModel, load_model
from stages.lm_eval.results import dump, rows, task_hashes, without_paths, write_samples
from stages.lm_eval.tasks import Benchmark, load_benchmarks
from stages.records.metrics import Metrics

VOLATILE = ("git_hash", "date", "start_time", "end_time", "total_evaluation_time_seconds", "pretty_env_info")
"""What two equal evaluations differ in: left out of results.json, for stage.json says when and on what machine. The
hash is that of whatever repository the current folder lies in."""


def run(context: Context) -> Metrics:
    """Measure `context.inputs["model"]`; leaves results.json and samples in `context.out`.

    The result: {"results": [row, ...], "seconds", "versions", "num_fewshot", "samples": {task: file name},
    "notes", "environment"}, a row as `results.rows` describes.
    """
    config: LMEvalStage = context.config
    started = time.monotonic()
    name = config.models[0]
    path = context.inputs["model"].path
    context.progress(0, 1, "reading tasks")
    files = {key: given.path for key, given in context.inputs.items() if key != "model"}
    with only_trusted_code(config):
        benchmarks = load_benchmarks(config, files, context.scratch)
        context.progress(0, 1, f"loading {name}")
        model = load_model(path, config)
        model.keep(context.checkpoints / f"answers-{model.rank}.jsonl", _counter(benchmarks, context.progress))
        evaluated = _evaluate(config, benchmarks, model, path)
        cut = _cut(model)
    if evaluated is None:
        return Metrics()
    results, samples = evaluated
    table = rows(results, benchmarks)
    kept = without_paths({key: value for key, value in results.items() if key not in VOLATILE}, _names(config, context))
    (context.out / "results.json").write_text(dump(kept, indent=2), encoding="utf-8")
    written = write_samples(samples, context.out) if config.options.log_samples else {}
    return Metrics(
        results=table,
        seconds=round(time.monotonic() - started, 3),
        versions=results["versions"],
        num_fewshot=results["n-shot"],
        samples=written,
        notes=[
            f"{task}: {count} of {results['results'][task]['sample_len']} items are longer than the model takes "
            f"({model.max_length} tokens): lm-eval cut them from the left, and their scores are of less than was asked"
            for task, count in sorted(cut.items())
        ],
        environment={
            "lm_eval": results["lm_eval_version"],
            "transformers": results["transformers_version"],
            "backend": config.options.backend,
            "processes": model.world_size,
            "dtype": str(model.model.dtype).removeprefix("torch.")
            if isinstance(model, HFModel)
            else config.options.dtype,
            "device": model.device.type if isinstance(model, HFModel) else "cuda",
            "max_length": model.max_length,
        },
    )


def _evaluate(
    config: LMEvalStage,
    benchmarks: list[Benchmark],
    model: KeepingModel,
    path: Path,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """lm-eval's results as its command would save them, and the samples by task; of several processes the first's."""
    options = config.options
    tracker = EvaluationTracker()
    results: Any = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(path), "dtype": options.dtype},  # recorded only: the model is loaded
        tasks=[part for benchmark in benchmarks for part in benchmark.parts],
        task_manager=TaskManager(include_defaults=False),  # the tasks are made; the default reads 14,000 files
        batch_size=options.batch_size,
        device=str(model.device),
        limit=options.limit,
        bootstrap_iters=options.bootstrap_iters,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        log_samples=True,  # the task hashes come from them, whether they are kept or not
        evaluation_tracker=tracker,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.multiturn,
        gen_kwargs=options.gen_kwargs.model_dump() or None,
        random_seed=DEFAULT_RANDOM_SEED if config.seed is None else config.seed,
        numpy_random_seed=DEFAULT_OTHER_SEED if config.seed is None else config.seed,
        torch_random_seed=DEFAULT_OTHER_SEED if config.seed is None else config.seed,
        fewshot_random_seed=DEFAULT_OTHER_SEED if config.seed is None else config.seed,
    )
    if results is None:
        return None
    samples = results.pop("samples")
    tracker.general_config_tracker.log_end_time()
    results["task_hashes"] = task_hashes(samples)
    results.update(asdict(tracker.general_config_tracker))
    results["model_source"] = options.backend
    return results, samples


def _cut(model: KeepingModel) -> Counter[str]:
    """How many items of each task were longer than the model takes, over all processes."""
    every: list[Any] = [model.cut]
    if model.world_size > 1:
        every = [None] * model.world_size
        torch.distributed.all_gather_object(every, model.cut)
    return Counter(task for task, _ in set().union(*every))


def _counter(benchmarks: list[Benchmark], progress: Callable[[int, int, str], None]) -> Callable[[int], None]:
    """Call what it returns with how many more requests are answered; about a hundred of the calls are passed on."""
    tasks = [task for benchmark in benchmarks for task in benchmark.tasks.values()]
    done = total = 0

    def answered(more: int) -> None:
        nonlocal done, total
        total = total or sum(request.repeats for task in tasks for request in task.instances)
        before, done = done, done + more
        share = max(1, total // 100)
        if done == total or done // share > before // share:
            progress(done, total, "requests")

    return answered


def _names(config: LMEvalStage, context: Context) -> dict[str, str]:
    """Path on this machine -> what to call it in results.json."""
    needs = config.needs()
    names = {str(given.path): needs[key].value for key, given in context.inputs.items() if key in needs}
    names |= {str(given.path.resolve()): needs[key].value for key, given in context.inputs.items() if key in needs}
    names |= {sanitize_model_name(path): sanitize_model_name(name) for path, name in names.items()}
    names |= {str(context.scratch): "scratch", str(context.scratch.resolve()): "scratch"}
    return names | {str(Path(lm_eval.__file__).parent): "lm_eval"}
