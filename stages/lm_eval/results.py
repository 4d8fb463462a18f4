"""What lm-eval returned -> the step's files and the rows that the report reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

from stages.base import UserError
from stages.lm_eval.tasks import Benchmark
from stages.records.metrics import ScoreRow
from stages.system.file_names import file_name


def rows(results: Mapping[str, Any], benchmarks: list[Benchmark]) -> list[ScoreRow]:
    """Every score, benchmark after benchmark, a group before its tasks."""
    return [
        row
        for i, benchmark in enumerate(benchmarks)
        for name in [*benchmark.groups, *benchmark.tasks]
        for row in _rows_of(name, results, _headline(name, i, benchmark, results))
    ]


def _headline(name: str, index: int, benchmark: Benchmark, results: Mapping[str, Any]) -> str | None:
    """The one key, such as `acc,none`, that heads the report; None for a mere part of a group."""
    if name not in benchmark.headlines:
        return None
    keys = [key for key, _ in _scores(results["results"][name])]
    asked = benchmark.config.metric
    if asked is None:
        return keys[0] if keys else None
    for key in keys:
        if asked in (key, key.partition(",")[0]):
            return key
    raise UserError(f"tasks.{index}.metric: {name} reported no {asked!r}, only {'; '.join(keys)}")


def _rows_of(name: str, results: Mapping[str, Any], headline: str | None) -> Iterator[ScoreRow]:
    measured = results["results"][name]
    better = results["higher_is_better"].get(name, {})
    for key, value in _scores(measured):
        metric, _, filtered = key.partition(",")
        yield ScoreRow(
            task=name,
            metric=metric,
            filter=filtered,
            value=_number(value),
            stderr=_number(measured.get(f"{metric}_stderr,{filtered}")),
            n=int(measured["sample_len"]),
            headline=key == headline,
            higher_is_better=better.get(metric),
        )


def _scores(measured: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """lm-eval keys a score `metric,filter`, beside `metric_stderr,filter` and a few plain words."""
    for key, value in measured.items():
        if "," in key and not key.partition(",")[0].endswith("_stderr"):
            yield key, value


def _number(value: Any) -> float | None:
    """A finite float; None for lm-eval's "N/A", and for what JSON cannot say."""
    if isinstance(value, str) or value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def task_hashes(samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """A hash of each task's questions and answers, computed as lm-eval's command does."""
    return {
        name: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows_))
        for name, rows_ in samples.items()
    }


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with this machine's paths replaced by names that mean something elsewhere."""
    if isinstance(value, str):
        for path in sorted(names, key=len, reverse=True):
            value = value.replace(path, names[path])
        return value
    if isinstance(value, Mapping):
        return {key: without_paths(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, names) for item in value]
    if isinstance(value, Path):
        return without_paths(str(value), names)
    return value


def dump(value: Any, indent: int | None = None) -> str:
    """JSON as lm-eval's command writes it."""
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def sample_file(task: str) -> str:
    """The name of a task's sample file; anything that is no plain word (a `/`, a `::`) becomes `_`."""
    name = file_name(f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}")
    return f"{name}.jsonl"


def write_samples(samples: Mapping[str, list[dict[str, Any]]], out: Path) -> dict[str, str]:
    """One JSONL file per task, in the form lm-eval's command writes; returns task -> file name."""
    for task, rows_ in samples.items():
        with (out / sample_file(task)).open("w", encoding="utf-8") as file:
            for row in rows_:
                file.write(dump(_plain(row)) + "\n")
    return {task: sample_file(task) for task in samples}


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    return {
        **sample,
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "arguments": arguments,
        "target": str(sample["target"]),
    }
