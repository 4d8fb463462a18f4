"""Scores of tasks of every form, compared with `python -m lm_eval` on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from stages.base import Context
from stages.lm_eval.stage import run
from stages.records.metrics import Metrics
from tests.stages.lm_eval.conftest import CHOICE, GENERATE
from tests.stages.lm_eval.test_stage import lm_eval_command, lm_eval_scores, score_rows, scores

Step = Callable[..., Context]


def metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


TEXT = {
    "task": "ref_text",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{question}} It is {{choices[answer]}}.",
    "metric_list": [
        metric("word_perplexity", "weighted_perplexity", higher_is_better=False),
        metric("byte_perplexity", "weighted_perplexity", higher_is_better=False),
        metric("bits_per_byte", "bits_per_byte", higher_is_better=False),
    ],
}
TRANSLATE = GENERATE | {
    "task": "ref_translate",
    "filter_list": [{"name": "plain", "filter": [{"function": "take_first"}]}],
    "metric_list": [metric("bleu", "bleu"), metric("chrf", "chrf"), metric("ter", "ter", higher_is_better=False)],
}
YES_OR_NO = CHOICE | {
    "task": "ref_yes_or_no",
    "doc_to_choice": ["yes", "no"],
    "metric_list": [metric("mcc", "matthews_corrcoef"), metric("f1", "f1"), metric("acc")],
}
SAMPLED = GENERATE | {
    "task": "ref_sampled",
    "repeats": 4,
    "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.9, "max_gen_toks": 3},
    "filter_list": [
        {
            "name": "majority",
            "filter": [
                {"function": "regex", "regex_pattern": "([a-z])"},
                {"function": "majority_vote"},
                {"function": "take_first"},
            ],
        },
        {"name": "first", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [metric("exact_match")],
}
GROUPS: list[dict[str, Any]] = [
    {
        "group": "ref_by_size",
        "task": ["ref_many", "ref_few"],
        "aggregate_metric_list": [
            {"metric": "acc", "weight_by_size": True},
            {"metric": "acc_norm", "weight_by_size": False},
        ],
    },
    {
        "group": "ref_nested",
        "task": ["ref_by_size", "ref_other"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    },
    {
        "group": "ref_filtered",
        "task": ["ref_letters", "ref_fewer_letters"],
        "aggregate_metric_list": [{"metric": "exact_match", "filter_list": ["letter"], "weight_by_size": True}],
    },
]
MEMBERS = {"ref_many": 20, "ref_few": 7, "ref_other": 12, "ref_letters": 20, "ref_fewer_letters": 9}
"""Task of a group -> how many items it has."""


@pytest.fixture(scope="module")
def tasks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    items = (world / "test.jsonl").read_text().splitlines()
    lists = [TEXT, TRANSLATE, YES_OR_NO, SAMPLED]
    for name, count in MEMBERS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(items[-count:]) + "\n")
        lists.append((GENERATE if "letters" in name else CHOICE) | {"task": name})
    for task in lists:
        own = folder / f"{task['task']}.jsonl"
        files = {"test": str(own if own.exists() else world / "test.jsonl"), "dev": str(world / "dev.jsonl")}
        local = {key: value for key, value in task.items() if key != "dataset_name"}
        local |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(local))
    for group in GROUPS:
        (folder / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    return folder


def compare(metrics: Metrics, reference: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Assert that values and errors are equal, but for errors from bootstraps of different size; return them.

    Perplexities are equal to the digits that sums in another order leave.
    """
    ours, theirs = scores(metrics), lm_eval_scores(reference)
    resampled = ("bleu", "chrf", "ter", "mcc", "f1", "perplexity", "bits_per_byte")
    assert ours.keys() == theirs.keys()
    for key, (value, stderr) in ours.items():
        assert value == pytest.approx(theirs[key][0], rel=1e-6 if "perplexity" in key[1] or "bits" in key[1] else 0)
        if not any(name in key[1] for name in resampled):
            assert stderr == theirs[key][1], key
    return ours


def test_groups_filters_and_every_type_of_metric(step: Step, model_path: Path, tasks: Path, tmp_path: Path) -> None:
    names = ["ref_nested", "ref_filtered", "ref_text", "ref_translate"]
    options = {"dtype": "float32", "bootstrap_iters": 10}
    metrics = run(step(include_path=str(tasks), tasks=[{"task": name} for name in names], options=options, seed=7))
    arguments = ["--tasks", ",".join(names), "--batch_size", "4", "--seed", "7"]
    found = compare(metrics, lm_eval_command(model_path, tasks, tmp_path, *arguments))
    for name, expected in {
        "ref_nested": {"ref_many": 20 / 39, "ref_few": 7 / 39, "ref_other": 12 / 39},
        "ref_filtered": {"ref_letters": 20 / 29, "ref_fewer_letters": 9 / 29},
    }.items():
        (row,) = (row for row in metrics.results or [] if row.task == name)
        assert row.members == pytest.approx(expected)
        key = f"{row.metric},{row.filter}"
        assert row.value == pytest.approx(sum(weight * found[task, key][0] for task, weight in expected.items()))
    assert {row["metric"] for row in score_rows(metrics) if row["headline"]} >= {"acc", "exact_match", "bleu"}


def test_metrics_of_all_items_at_once(step: Step, model_path: Path, tasks: Path) -> None:
    """lm-eval's command would resample them 100,000 times, so this calls its function."""
    options = {"dtype": "float32", "bootstrap_iters": 0}
    metrics = run(step(include_path=str(tasks), tasks=[{"task": "ref_yes_or_no"}], options=options, seed=7))
    reference: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_path), "dtype": "float32"},
        tasks=["ref_yes_or_no"],
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    found = compare(metrics, reference)
    assert {key.partition(",")[0] for _, key in found} == {"mcc", "f1", "acc"}


def test_few_shot_examples_as_turns_of_a_chat(step: Step, model_path: Path, tasks: Path, tmp_path: Path) -> None:
    names = ["ref_by_size", "ref_translate"]
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "dtype": "float32"}
    entries = [{"task": name, "num_fewshot": 3} for name in names]
    metrics = run(step(include_path=str(tasks), tasks=entries, options=options | {"bootstrap_iters": 10}, seed=7))
    arguments = ["--tasks", ",".join(names), "--num_fewshot", "3", "--batch_size", "4", "--seed", "7"]
    arguments += ["--apply_chat_template", "--fewshot_as_multiturn"]
    compare(metrics, lm_eval_command(model_path, tasks, tmp_path, *arguments))


def test_repeats_are_separate_draws(step: Step, model_path: Path, tasks: Path, tmp_path: Path) -> None:
    options = {"dtype": "float32"}
    context = step(include_path=str(tasks), tasks=[{"task": "ref_sampled"}], options=options, seed=7)
    metrics = run(context)
    arguments = ["--tasks", "ref_sampled", "--batch_size", "4", "--seed", "7"]
    compare(metrics, lm_eval_command(model_path, tasks, tmp_path, *arguments))
    samples = [json.loads(line) for line in (context.out / "samples_ref_sampled.jsonl").open()]
    assert all(len(sample["resps"][0]) == 4 for sample in samples)
    assert any(len(set(sample["resps"][0])) > 1 for sample in samples)
