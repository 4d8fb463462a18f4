"""Convert lm-eval's results to score rows and write the step's files."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

from stages.base import UserError
from stages.lm_eval.tasks import Benchmark
from stages.records.metrics import ScoreRow
from stages.system.file_names import file_name


def score_rows(results: Mapping[str, Any], benchmarks: list[Benchmark]) -> list[ScoreRow]:
    """Return every score, benchmark by benchmark, a group before its tasks."""
    rows = []
    for i, benchmark in enumerate(benchmarks):
        for name in [*benchmark.groups, *benchmark.tasks]:
            scores, higher_is_better = results["results"][name], results["higher_is_better"].get(name, {})
            # the other keys are `metric_stderr,filter` and a few without a comma
            keys = [key for key in scores if "," in key and not key.partition(",")[0].endswith("_stderr")]
            headline = _headline(keys, name, i, benchmark)
            for key in keys:
                metric, _, filter_name = key.partition(",")
                row = ScoreRow(
                    task=name,
                    metric=metric,
                    filter=filter_name,
                    value=_number(scores[key]),
                    stderr=_number(scores.get(f"{metric}_stderr,{filter_name}")),
                    n=int(scores["sample_len"]),
                    headline=key == headline,
                    higher_is_better=higher_is_better.get(metric),
                )
                if name in benchmark.groups:
                    row = row.model_copy(update={"members": _members(benchmark.groups[name], key, results["results"])})
                rows.append(row)
    return rows


def _members(group: Group, key: str, scores: Mapping[str, Any]) -> dict[str, float]:
    """The weights by which a group's score under `key` sums up those of its tasks, as in lm-eval's Group.aggregate."""
    metric, _, filter_name = key.partition(",")
    by_size = next(
        each.weight_by_size
        for each in group.aggregate_metric_list or []
        if each.metric == metric and filter_name in (each.filter_list or [filter_name])
    )
    names = [task.task_name for task in group.get_all_tasks() if key in scores[task.task_name]]
    sizes = {name: scores[name]["sample_len"] if by_size else 1 for name in names}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def _headline(keys: list[str], name: str, index: int, benchmark: Benchmark) -> str | None:
    """The key, such as `acc,none`, of the headline score; None if the report's main table does not show `name`."""
    if name not in benchmark.headlines:
        return None
    metric = benchmark.config.metric
    matches = [key for key in keys if metric in (None, key, key.partition(",")[0])]
    if metric is not None and not matches:
        raise UserError(f"tasks.{index}.metric: {name} reported no {metric!r}, only {'; '.join(keys)}")
    return matches[0] if matches else None


def _number(value: Any) -> float | None:
    """A finite float; None for lm-eval's "N/A" and for values that JSON does not have."""
    number = math.nan if value is None or isinstance(value, str) else float(value)
    return number if math.isfinite(number) else None


def task_hashes(samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Hash each task's questions and answers as lm-eval's command does."""
    return {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in task_samples))
        for task, task_samples in samples.items()
    }


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """Replace this machine's paths in a JSON text by names that are the same on every machine."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(dump(path)[1:-1], dump(names[path])[1:-1])
    return text


def dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def write_samples(samples: Mapping[str, list[dict[str, Any]]], out: Path) -> dict[str, str]:
    """Write a JSONL file per task, in the format of lm-eval's command; return task -> file name."""
    files = {}
    for task, task_samples in samples.items():
        name = file_name(f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}")
        files[task] = f"{name}.jsonl"
        with (out / files[task]).open("w", encoding="utf-8") as file:
            for sample in task_samples:
                file.write(dump(_serializable(sample)) + "\n")
    return files


def _serializable(sample: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    responses = {key: sanitize_list(sample[key]) for key in ("resps", "filtered_resps")}
    return sample | responses | {"arguments": arguments, "target": str(sample["target"])}
