"""Evaluations of a tiny model, compared with lm-eval's own command and function."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from torch.utils import collect_env

from stages.base import Context, UserError
from stages.inference.generation import Batch
from stages.inference.scoring import TreeScorer
from stages.lm_eval.stage import run
from stages.records.metrics import Metrics
from tests.stages.lm_eval.conftest import CHOICE, GENERATE, own_data

Step = Callable[..., Context]


def self_contained(world: Path, out: Path) -> Path:
    """Write the two task files for lm-eval's command, with the paths of their data; return their folder."""
    tasks = out / "tasks"
    tasks.mkdir(parents=True)
    files = {split: str(world / f"{split}.jsonl") for split in ("test", "dev")}
    for task in (CHOICE, GENERATE):
        local = {key: value for key, value in task.items() if key != "dataset_name"}
        local |= {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(out / "datasets")},
        }
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(local))
    return tasks


def lm_eval_command(model: Path, tasks: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run `lm_eval run` on task files and return its results."""
    executable = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    executable += ["--model_args", f"pretrained={model},dtype=float32"]
    subprocess.run(
        [*executable, "--include_path", str(tasks), "--output_path", str(out), "--log_samples", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    (file,) = out.glob("*/results_*.json")
    return json.loads(file.read_text())


def score_rows(metrics: Metrics) -> list[dict[str, Any]]:
    """The stage's score rows as JSON."""
    return metrics.to_json()["results"]


def scores(metrics: Metrics) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(task, `metric,filter`) -> (value, stderr) of the stage."""
    return {(r["task"], f"{r['metric']},{r['filter']}"): (r["value"], r["stderr"]) for r in score_rows(metrics)}


def lm_eval_scores(results: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """The same from lm-eval's results."""
    pairs = {}
    for task, task_results in results["results"].items():
        for key, value in task_results.items():
            if "," in key and "_stderr," not in key:
                stderr = task_results[key.replace(",", "_stderr,")]
                pairs[task, key] = (value, None if stderr == "N/A" else stderr)
    return pairs


def test_scores_are_those_of_the_lm_eval_command(step: Step, model_path: Path, world: Path, tmp_path: Path) -> None:
    tasks = [own_data("tiny_choice", num_fewshot=2), own_data("tiny_generate", num_fewshot=2)]
    options = {"apply_chat_template": True, "dtype": "float32", "bootstrap_iters": 50}
    options["system_instruction"] = "Be brief."
    context = step(tasks=tasks, options=options, seed=7)
    metrics = run(context)
    reference = lm_eval_command(
        model_path,
        self_contained(world, tmp_path / "reference"),
        tmp_path / "reference",
        *("--tasks", "tiny_choice,tiny_generate", "--num_fewshot", "2", "--batch_size", "4"),
        *("--apply_chat_template", "--seed", "7", "--system_instruction", "Be brief."),
    )
    expected = lm_eval_scores(reference)
    assert len(expected) == 6
    # chrf's standard error is a bootstrap: lm-eval's command has 100 resamples, the stage 50.
    plain = {key: pair for key, pair in expected.items() if "chrf" not in key[1]}
    assert {key: pair for key, pair in scores(metrics).items() if "chrf" not in key[1]} == plain
    assert {key: pair[0] for key, pair in scores(metrics).items()} == {key: pair[0] for key, pair in expected.items()}
    saved = json.loads((context.out / "results.json").read_text())
    same = ("task_hashes", "versions", "n-shot", "n-samples", "chat_template_sha", "system_instruction_sha")
    for key in (*same, "fewshot_as_multiturn", "higher_is_better", "lm_eval_version"):
        assert saved[key] == reference[key], key
    assert len({value for value, _ in plain.values()}) > 1, "a test of equal scores needs scores that differ"


def test_scores_without_a_template_equal_lm_eval(step: Step, model_path: Path, world: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["tiny_choice", "tiny_generate"]
    same: dict[str, Any] = {"limit": 13, "gen_kwargs": {"max_gen_toks": 9}}
    options = same | {"dtype": "float32", "max_length": 60, "bootstrap_iters": 100}
    metrics = run(step(tasks=[own_data(name, num_fewshot=1) for name in names], options=options))
    reference = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_path), "dtype": "float32", "max_length": 60},
        tasks=names,  # type: ignore[arg-type]
        num_fewshot=1,
        device="cpu",
        task_manager=TaskManager(
            include_path=str(self_contained(world, tmp_path / "reference")), include_defaults=False
        ),
        **same,
    )
    assert scores(metrics) == lm_eval_scores(reference)  # type: ignore[arg-type]
    assert {row["n"] for row in score_rows(metrics)} == {13}
    assert metrics.num_fewshot == {"tiny_choice": 1, "tiny_generate": 1}


def test_truncated_items_are_noted(step: Step, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is a byte, after <s>. The count includes items of an interrupted attempt."""
    items = [json.loads(line) for line in (world / "test.jsonl").open()]
    room = 50
    choices = [max(map(len, item["choices"])) + 1 for item in items]  # after a space
    prompts = [len(f"Question: {item['question']}\nAnswer:") + 1 for item in items]
    too_long = sum(prompt + choice > room + 1 for prompt, choice in zip(prompts, choices, strict=True))
    generated = sum(len(item["question"]) + 1 > room - 6 for item in items)
    assert 0 < too_long < 20
    assert 0 < generated < 20
    tasks = [own_data("tiny_choice"), own_data("tiny_generate")]
    context = step(tasks=tasks, options={"max_length": room})
    forward, calls = Batch._forward, 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(Batch, "_forward", fails)
    with pytest.raises(KeyboardInterrupt):
        run(context)
    notes = run(replace(context, scratch=context.scratch / "again")).notes
    assert [note.split(" items")[0] for note in notes] == [
        f"tiny_choice: {too_long} of 20",
        f"tiny_generate: {generated} of 20",
    ]
    assert all(f"longer than the model takes ({room} tokens)" in note for note in notes)
    assert run(step(tasks=tasks, options={})).notes == []


def test_batch_size_does_not_affect_scores(step: Step) -> None:
    tasks = [own_data("tiny_choice"), own_data("tiny_generate")]
    small, large = (
        run(step(tasks=tasks, options={"batch_size": size, "apply_chat_template": True})) for size in (64, 1024)
    )
    assert small.results == large.results


@pytest.mark.parametrize("shots", [0, 2])
def test_the_engine_gives_the_samples_of_lm_eval_s_own_batches(step: Step, shots: int) -> None:
    tasks = [own_data("tiny_choice", num_fewshot=shots), own_data("tiny_generate", num_fewshot=shots)]
    contexts = [step(tasks=tasks, options={"engine": engine, "dtype": "float32"}) for engine in ("shared", "lm_eval")]
    shared, plain = map(run, contexts)
    assert shared.results == plain.results
    assert (shared.environment["engine"], plain.environment["engine"]) == ("shared", "lm_eval")
    ours, theirs = (
        [json.loads(line) for line in (context.out / "samples_tiny_choice.jsonl").open()] for context in contexts
    )
    for mine, expected in zip(ours, theirs, strict=True):
        pairs = zip(mine["filtered_resps"], expected["filtered_resps"], strict=True)
        for (log_prob, is_greedy), (other, other_is_greedy) in pairs:
            assert float(log_prob) == pytest.approx(float(other), abs=5e-5)
            assert is_greedy == other_is_greedy
    texts = [(context.out / "samples_tiny_generate.jsonl").read_text() for context in contexts]
    assert texts[0] == texts[1]


def test_bootstrap_does_not_fork(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked while torch's threads run can wait forever for a lock of theirs."""
    monkeypatch.setattr(multiprocessing, "Pool", lambda *_: pytest.fail("lm-eval forks to resample"))
    metrics = run(step(tasks=[own_data("tiny_generate")], options={}))
    resampled = [row["stderr"] for row in score_rows(metrics) if row["metric"] == "chrf"]
    assert resampled
    assert None not in resampled


def test_it_does_not_ask_pip_for_what_the_results_leave_out(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: str(asked.append("pip list")))
    context = step(tasks=[own_data("tiny_generate")], options={})
    run(context)
    assert not asked
    collect_env.get_pretty_env_info()
    assert asked == ["pip list"], "it is as it was before"
    assert "lm_eval_version" in json.loads((context.out / "results.json").read_text())


def test_files_rows_and_progress(step: Step, model_path: Path, world: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    tasks = [own_data("tiny_generate", metric="exact_match,letter"), own_data("tiny_choice")]
    context = step(tasks=tasks, progress=lambda *state: seen.append(state))
    metrics = run(context)
    heads = [(r["task"], r["metric"], r["filter"]) for r in score_rows(metrics) if r["headline"]]
    assert heads == [("tiny_generate", "exact_match", "letter"), ("tiny_choice", "acc", "none")]
    assert metrics.versions == {"tiny_choice": 1.5, "tiny_generate": 2}
    assert all(row["n"] == 20 and row["higher_is_better"] is True for row in score_rows(metrics))
    text = (context.out / "results.json").read_text()
    for path in (model_path, world, context.out, context.scratch):
        assert str(path) not in text
    assert json.loads(text)["model_name"] == "wit"
    assert sorted(p.name for p in context.out.iterdir()) == [
        "results.json",
        "samples_tiny_choice.jsonl",
        "samples_tiny_generate.jsonl",
    ]
    samples = [json.loads(line) for line in (context.out / metrics.samples["tiny_choice"]).open()]
    acc = next(r["value"] for r in score_rows(metrics) if r["metric"] == "acc")
    assert sum(sample["acc"] for sample in samples) / len(samples) == pytest.approx(acc)
    requests = sum(len(sample["arguments"]) for sample in samples) + 20
    assert seen[-1] == (requests, requests, "requests")
    counts = [done for done, total, _ in seen if total == requests]
    assert counts == sorted(counts)
    assert not any(context.cache.iterdir())


def test_samples_are_optional(step: Step) -> None:
    context = step(tasks=[own_data("tiny_choice")], options={"log_samples": False, "limit": 2})
    assert run(context).samples == {}
    assert [p.name for p in context.out.iterdir()] == ["results.json"]
    assert json.loads((context.out / "results.json").read_text())["task_hashes"]["tiny_choice"]


@pytest.mark.usefixtures("own_tasks_only")
def test_a_group_has_rows_for_itself_and_its_tasks(step: Step, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grouped"
    folder.mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}}}
    for name in ("part_a", "part_b"):
        part = {k: v for k, v in CHOICE.items() if k not in ("dataset_name", "fewshot_split")} | data | {"task": name}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part))
    group: dict[str, Any] = {"group": "both", "task": ["part_a", "part_b"]}
    group["aggregate_metric_list"] = [{"metric": "acc_norm", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    context = step(tasks=[{"task": "both"}], include_path=str(folder))
    metrics = run(context)
    assert [(r["task"], r["metric"], r["headline"]) for r in score_rows(metrics)] == [
        ("both", "acc_norm", True),
        *[(part, metric, False) for part in ("part_a", "part_b") for metric in ("acc", "acc_norm")],
    ]
    with pytest.raises(UserError, match=r"both reports no 'acc', only acc_norm"):
        run(step(tasks=[{"task": "both", "metric": "acc"}], include_path=str(folder)))
    with pytest.raises(UserError, match=r"part_a.*keep one of the two"):
        run(step(tasks=[{"task": "both"}, {"task": "part_a"}], include_path=str(folder)))


@pytest.mark.usefixtures("own_tasks_only")
def test_tasks_are_checked_before_the_model_is_loaded(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lm_eval.stage.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"tiny_choice reports no 'f1', only acc, acc_norm"):
        run(step(tasks=[own_data("tiny_choice", metric="f1")]))
    with pytest.raises(UserError, match=r".* 'tiny_choise'; did you mean tiny_choice"):
        run(step(tasks=[own_data("tiny_generate"), {"task": "tiny_choise"}]))
    with pytest.raises(UserError, match=r"tiny_choice reads the split dev too"):
        run(step(tasks=[{"task": "tiny_choice", "num_fewshot": 3, "data": {"test": "test.jsonl"}}]))
    with pytest.raises(UserError, match=r"tiny_choice cannot be loaded"):
        run(step(tasks=[{"task": "tiny_choice"}]))


def test_a_tokenizer_without_a_template(step: Step, model_path: Path, tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(model_path, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    context = step(tasks=[own_data("tiny_choice")], options={"apply_chat_template": True})
    context.inputs["model"] = replace(context.inputs["model"], path=bare)
    with pytest.raises(UserError, match="the tokenizer of wit has no chat template"):
        run(context)


RUN = """\
import os

def run_it(results):
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    exec(open(__file__).read().replace("def run_it", "def again"))
    return 1.0
"""


def own_task(folder: Path, world: Path, **changes: Any) -> dict[str, Any]:
    """Write the task `mine`, a changed tiny_generate, to `folder`; return the keys of a section that evaluates it."""
    folder.mkdir(exist_ok=True)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}}}
    task = GENERATE | data | {"task": "mine"} | changes
    (folder / "mine.yaml").write_text(yaml.safe_dump(task).replace("'!function u.run_it'", "!function u.run_it"))
    (folder / "u.py").write_text(RUN)
    return {"tasks": [{"task": "mine"}], "include_path": str(folder)}


@pytest.mark.usefixtures("own_tasks_only")
def test_generated_code_runs_only_if_confirmed(
    step: Step, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal covers groups, precedes the import of the task's Python and ignores the user's environment."""
    metric = [{"metric": "!function u.run_it", "aggregation": "mean", "higher_is_better": True}]
    section = own_task(tmp_path / "unsafe", world, unsafe_code=True, metric_list=metric, filter_list=None)
    (tmp_path / "unsafe" / "group.yaml").write_text("group: ours\ntask: [mine]\n")
    metrics = run(step(**section, options={"confirm_run_unsafe_code": True, "limit": 2}))
    assert [row["value"] for row in score_rows(metrics)] == [1.0]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (tmp_path / "unsafe" / "u.py").write_text("raise SystemExit('imported')")
    for name in ("mine", "ours"):
        with pytest.raises(UserError, match=rf"{name} runs .*options\.confirm_run_unsafe_code: true"):
            run(step(**section | {"tasks": [{"task": name}]}))


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_list": [{"metric": "org/metric"}]}, "'org/metric' is a metric that evaluate loads from the hub"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "set trust_remote_code: true on the stage"),
        ({"generation_kwargs": {"custom_generate": "org/x", "trust_remote_code": True}}, "mine sets custom_generate"),
    ],
)
def test_code_from_the_hub_is_refused(
    step: Step, world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(step(**own_task(tmp_path / "foreign", world, **changes)))


class Killed(BaseException):
    """Simulates the death of the process."""


def test_an_interrupted_evaluation_resumes(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reuses the logged answers and writes the same bytes as an evaluation without interruption."""
    tasks = [own_data("tiny_choice", num_fewshot=1), own_data("tiny_generate")]
    options = {"bootstrap_iters": 10, "batch_size": 64}
    uninterrupted = step(tasks=tasks, options=options)
    expected = run(uninterrupted)

    passes = 0
    for kind in (TreeScorer, Batch):
        original = kind._forward

        def counted(*arguments: Any, original: Any = original) -> Any:
            nonlocal passes
            passes += 1
            if passes == dies_at:
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(kind, "_forward", counted)
    dies_at = 0
    run(step(tasks=tasks, options=options))
    needed = passes
    assert needed > 15
    context = step(tasks=tasks, options=options)
    for dies_at in (6, needed // 2, 7):  # counted from each attempt's first pass
        passes = 0
        with pytest.raises(Killed):
            run(replace(context, scratch=context.scratch / str(dies_at)))
    passes = dies_at = 0
    seen: list[tuple[int, int, str]] = []
    resumed = replace(context, progress=lambda *state: seen.append(state))
    assert run(resumed).extended(seconds=0) == expected.extended(seconds=0)
    assert passes < needed - needed // 4
    assert seen[-1][0] == seen[-1][1] == max(total for _, total, _ in seen)
    for file in uninterrupted.out.iterdir():
        assert file.read_bytes() == (context.out / file.name).read_bytes(), file.name


def test_a_seed_gives_the_same_draws(step: Step) -> None:
    options = {"gen_kwargs": {"do_sample": True, "temperature": 1.5}, "limit": 3}
    context = step(tasks=[own_data("tiny_generate")], options=options, seed=3)
    run(context)
    first = (context.out / "samples_tiny_generate.jsonl").read_text()
    run(context)
    assert (context.out / "samples_tiny_generate.jsonl").read_text() == first, "the seed is the same"


@pytest.mark.parametrize("settings", [{"temperature": 0.9}, {"temperature": 0.9, "do_sample": True}])
def test_a_resumed_evaluation_draws_as_if_it_had_not_stopped(
    step: Step, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Each repeat of a request keeps its own answer."""
    kwargs = {"until": ["\n"], "max_gen_toks": 5} | settings
    filters = [{"name": "first", "filter": [{"function": "take_first"}]}]
    section = own_task(tmp_path / "own", world, generation_kwargs=kwargs, repeats=3, filter_list=filters)
    section |= {"options": {"bootstrap_iters": 0, "limit": 6}}
    uninterrupted = step(**section)
    expected = run(uninterrupted)
    samples = [json.loads(line) for line in (uninterrupted.out / "samples_mine.jsonl").open()]
    assert any(len(set(sample["resps"][0])) > 1 for sample in samples)
    generate, batches = HFLM._model_generate, 0

    def dies(*arguments: Any, **options: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Killed
        return generate(*arguments, **options)

    monkeypatch.setattr(HFLM, "_model_generate", dies)
    context = step(**section)
    for attempt in range(2):
        batches = 0
        with pytest.raises(Killed):
            run(replace(context, scratch=context.scratch / str(attempt)))
    batches = 3
    assert run(context).extended(seconds=0) == expected.extended(seconds=0)
    for file in uninterrupted.out.iterdir():
        assert file.read_bytes() == (context.out / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["both", "all_parts", "mmlu_astronomy"])
def test_a_copy_of_the_data_set_for_a_group_a_tag_and_a_task(step: Step, tmp_path: Path, name: str) -> None:
    """Scores equal those of tasks that name the copy themselves. mmlu_astronomy is lm-eval's own task."""
    folder, copy = tmp_path / "grouped", tmp_path / "copy"
    folder.mkdir()
    subsets = ["anatomy", "astronomy"]
    for subset in subsets:
        for split, count in (("test", 8), ("dev", 5)):
            rows = [
                {"question": f"{subset} {i}?", "choices": [f"{i}", "x", f"{i}{i}", "y"], "answer": i % 4}
                for i in range(count)
            ]
            (copy / subset).mkdir(parents=True, exist_ok=True)
            (copy / subset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [
        {
            "config_name": subset,
            "data_files": [{"split": split, "path": f"{subset}/{split}.jsonl"} for split in ("test", "dev")],
        }
        for subset in subsets
    ]
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for subset in subsets:
        part = CHOICE | {"task": f"part_{subset}", "dataset_name": subset, "tag": ["all_parts"]}
        (folder / f"{subset}.yaml").write_text(yaml.safe_dump(part))
    group: dict[str, Any] = {"group": "both", "task": [f"part_{subset}" for subset in subsets]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    context = step(tasks=[{"task": name, "num_fewshot": 2, "dataset": str(copy)}], include_path=str(folder))
    metrics = run(context)
    pairs = scores(metrics)
    if name == "mmlu_astronomy":
        samples = [json.loads(line) for line in (context.out / "samples_mmlu_astronomy.jsonl").open()]
        assert [sample["doc"]["question"] for sample in samples] == [f"astronomy {i}?" for i in range(8)]
        return
    parts = {f"part_{subset}" for subset in subsets}
    assert {task for task, _ in pairs} == parts | ({"both"} if name == "both" else set())
    for subset in subsets:
        config = {"include": str(folder / f"{subset}.yaml"), "task": f"part_{subset}", "dataset_path": str(copy)}
        alone = tmp_path / f"{subset}"
        alone.mkdir()
        (alone / "task.yaml").write_text(yaml.safe_dump(config))
        reference = run(step(tasks=[{"task": f"part_{subset}", "num_fewshot": 2}], include_path=str(alone)))
        expected = scores(reference)
        assert {key: value for key, value in pairs.items() if key[0] == f"part_{subset}"} == expected


@pytest.mark.usefixtures("own_tasks_only")
def test_a_filter_that_hangs_on_an_answer_is_stopped(
    step: Step, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern whose time doubles with each character of an answer."""
    monkeypatch.setattr("stages.lm_eval.stage.FILTER_SECONDS", 1.0)
    monkeypatch.setattr("stages.lm_eval.stage.FILTER_SECONDS_PER_ITEM", 0.0)
    pattern = {"function": "regex", "regex_pattern": r"((.|\s)+)+\x00\x01never"}
    changes = {"filter_list": [{"name": "slow", "filter": [pattern]}], "generation_kwargs": {"max_gen_toks": 40}}
    with pytest.raises(
        UserError, match="a filter of mine takes longer than 1 seconds on the answers; repair its pattern"
    ):
        run(step(**own_task(tmp_path / "own", world, **changes)))
