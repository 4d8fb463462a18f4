"""The stage really evaluates a tiny model; lm-eval's own command says what the scores must be."""

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

from stages.base import Context, UserError
from stages.lm_eval.stage import run
from tests.stages.lm_eval.conftest import CHOICE, GENERATE, own_data

Step = Callable[..., Context]


def self_contained(world: Path, out: Path) -> Path:
    """The two task files as one would write them for lm-eval's command: they name their data themselves."""
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


def command(model: Path, world: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """What `lm_eval run` reports."""
    tasks = self_contained(world, out)
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


def scores(metrics: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(task, metric,filter) -> (value, stderr) as the stage returned them."""
    return {(r["task"], f"{r['metric']},{r['filter']}"): (r["value"], r["stderr"]) for r in metrics["results"]}


def theirs(results: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """The same out of lm-eval's file."""
    found = {}
    for task, measured in results["results"].items():
        for key, value in measured.items():
            if "," in key and "_stderr," not in key:
                stderr = measured[key.replace(",", "_stderr,")]
                found[task, key] = (value, None if stderr == "N/A" else stderr)
    return found


def test_scores_are_those_of_the_lm_eval_command(step: Step, model_path: Path, world: Path, tmp_path: Path) -> None:
    tasks = [own_data("tiny_choice", num_fewshot=2), own_data("tiny_generate", num_fewshot=2)]
    options = {"apply_chat_template": True, "batch_size": 4, "dtype": "float32", "bootstrap_iters": 50}
    options["system_instruction"] = "Be brief."
    context = step(tasks=tasks, options=options, seed=7)
    mine = run(context)
    reference = command(
        model_path,
        world,
        tmp_path / "reference",
        *("--tasks", "tiny_choice,tiny_generate", "--num_fewshot", "2", "--batch_size", "4"),
        *("--apply_chat_template", "--seed", "7", "--system_instruction", "Be brief."),
    )
    expected = theirs(reference)
    assert len(expected) == 6
    # chrf's standard error is a bootstrap; lm-eval caps its resamples at 100, the stage was asked for 50.
    plain = {key: pair for key, pair in expected.items() if "chrf" not in key[1]}
    assert {key: pair for key, pair in scores(mine).items() if "chrf" not in key[1]} == plain
    assert {key: pair[0] for key, pair in scores(mine).items()} == {key: pair[0] for key, pair in expected.items()}
    saved = json.loads((context.out / "results.json").read_text())
    same = ("task_hashes", "versions", "n-shot", "n-samples", "chat_template_sha", "system_instruction_sha")
    for key in (*same, "fewshot_as_multiturn", "higher_is_better", "lm_eval_version"):
        assert saved[key] == reference[key], key
    assert len({value for value, _ in plain.values()}) > 1, "a test of equal scores needs scores that differ"


def test_a_trial_without_template_equals_lm_eval_too(step: Step, model_path: Path, world: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["tiny_choice", "tiny_generate"]
    same: dict[str, Any] = {"batch_size": 3, "limit": 13, "gen_kwargs": {"max_gen_toks": 9}}
    options = same | {"dtype": "float32", "max_length": 60, "bootstrap_iters": 100}
    mine = run(step(tasks=[own_data(name, num_fewshot=1) for name in names], options=options))
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
    assert scores(mine) == theirs(reference)  # type: ignore[arg-type]
    assert {row["n"] for row in mine["results"]} == {13}
    assert mine["num_fewshot"] == {"tiny_choice": 1, "tiny_generate": 1}


def test_items_that_do_not_fit_are_told(step: Step, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval cuts them from the left. A token is a byte, and <s> comes before. Counted over a resumption, too."""
    items = [json.loads(line) for line in (world / "test.jsonl").open()]
    room = 50
    choices = [max(map(len, item["choices"])) + 1 for item in items]  # after a space
    asked = [len(f"Question: {item['question']}\nAnswer:") + 1 for item in items]
    too_long = sum(text + choice > room + 1 for text, choice in zip(asked, choices, strict=True))
    generated = sum(len(item["question"]) + 1 > room - 6 for item in items)
    assert 0 < too_long < 20
    assert 0 < generated < 20
    tasks = [own_data("tiny_choice"), own_data("tiny_generate")]
    context = step(tasks=tasks, options={"max_length": room, "batch_size": 4})
    forward = HFLM._model_generate
    calls = 0

    def fails(self: HFLM, *arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(HFLM, "_model_generate", fails)
    with pytest.raises(KeyboardInterrupt):
        run(context)
    notes = run(replace(context, scratch=context.scratch / "again"))["notes"]
    assert [note.split(" items")[0] for note in notes] == [
        f"tiny_choice: {too_long} of 20",
        f"tiny_generate: {generated} of 20",
    ]
    assert all(f"longer than the model takes ({room} tokens)" in note for note in notes)
    assert run(step(tasks=tasks, options={"batch_size": 4}))["notes"] == []


def test_batch_size_moves_no_score(step: Step) -> None:
    tasks = [own_data("tiny_choice"), own_data("tiny_generate")]
    one, eight = (run(step(tasks=tasks, options={"batch_size": size, "apply_chat_template": True})) for size in (1, 8))
    assert one["results"] == eight["results"]


def test_resampling_forks_nothing(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked beside torch's threads may wait for ever for a lock that nobody holds any more."""
    monkeypatch.setattr(multiprocessing, "Pool", lambda *_: pytest.fail("lm-eval forks to resample"))
    metrics = run(step(tasks=[own_data("tiny_generate")], options={"batch_size": 4}))
    resampled = [row["stderr"] for row in metrics["results"] if row["metric"] == "chrf"]
    assert resampled
    assert None not in resampled


def test_files_rows_and_progress(step: Step, model_path: Path, world: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    tasks = [own_data("tiny_generate", metric="exact_match,letter"), own_data("tiny_choice")]
    context = step(tasks=tasks, progress=lambda *state: seen.append(state))
    metrics = run(context)
    heads = [(r["task"], r["metric"], r["filter"]) for r in metrics["results"] if r["headline"]]
    assert heads == [("tiny_generate", "exact_match", "letter"), ("tiny_choice", "acc", "none")]
    assert metrics["versions"] == {"tiny_choice": 1.5, "tiny_generate": 2}
    assert all(row["n"] == 20 and row["higher_is_better"] is True for row in metrics["results"])
    text = (context.out / "results.json").read_text()
    for path in (model_path, world, context.out, context.scratch):
        assert str(path) not in text
    assert json.loads(text)["model_name"] == "wit"
    assert sorted(p.name for p in context.out.iterdir()) == [
        "results.json",
        "samples_tiny_choice.jsonl",
        "samples_tiny_generate.jsonl",
    ]
    samples = [json.loads(line) for line in (context.out / metrics["samples"]["tiny_choice"]).open()]
    acc = next(r["value"] for r in metrics["results"] if r["metric"] == "acc")
    assert sum(sample["acc"] for sample in samples) / len(samples) == pytest.approx(acc)
    requests = sum(len(sample["arguments"]) for sample in samples) + 20
    assert seen[-1] == (requests, requests, "requests")
    assert [done for done, total, _ in seen if total == requests] == list(range(1, requests + 1))
    assert not any(context.cache.iterdir())


def test_samples_only_when_asked(step: Step) -> None:
    context = step(tasks=[own_data("tiny_choice")], options={"log_samples": False, "limit": 2})
    assert run(context)["samples"] == {}
    assert [p.name for p in context.out.iterdir()] == ["results.json"]
    assert json.loads((context.out / "results.json").read_text())["task_hashes"]["tiny_choice"]


@pytest.mark.usefixtures("own_tasks_only")
def test_a_group_gives_its_row_and_its_parts(step: Step, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grouped"
    folder.mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}}}
    for name in ("part_a", "part_b"):
        part = {k: v for k, v in CHOICE.items() if k not in ("dataset_name", "fewshot_split")} | data | {"task": name}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part))
    whole = {"group": "whole", "task": ["part_a", "part_b"]}
    whole["aggregate_metric_list"] = [{"metric": "acc_norm", "weight_by_size": True}]
    (folder / "whole.yaml").write_text(yaml.safe_dump(whole))
    context = step(tasks=[{"task": "whole"}], include_path=str(folder))
    metrics = run(context)
    assert [(r["task"], r["metric"], r["headline"]) for r in metrics["results"]] == [
        ("whole", "acc_norm", True),
        *[(part, metric, False) for part in ("part_a", "part_b") for metric in ("acc", "acc_norm")],
    ]
    with pytest.raises(UserError, match=r"tasks\.0\.metric: whole reports no 'acc', only acc_norm"):
        run(step(tasks=[{"task": "whole", "metric": "acc"}], include_path=str(folder)))
    with pytest.raises(UserError, match=r"part_a.*keep one of the two"):
        run(step(tasks=[{"task": "whole"}, {"task": "part_a"}], include_path=str(folder)))


@pytest.mark.usefixtures("own_tasks_only")
def test_what_cannot_be_run_is_said_before_the_model_is_loaded(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lm_eval.stage.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"tasks\.0\.metric: tiny_choice reports no 'f1', only acc, acc_norm"):
        run(step(tasks=[own_data("tiny_choice", metric="f1")]))
    with pytest.raises(UserError, match=r"tasks\.1\.task: .* 'tiny_choise'; did you mean tiny_choice"):
        run(step(tasks=[own_data("tiny_generate"), {"task": "tiny_choise"}]))
    with pytest.raises(UserError, match=r"tasks\.0\.data: tiny_choice reads the split dev too"):
        run(step(tasks=[{"task": "tiny_choice", "num_fewshot": 3, "data": {"test": "test.jsonl"}}]))
    with pytest.raises(UserError, match=r"tasks\.0\.task: tiny_choice cannot be loaded"):
        run(step(tasks=[{"task": "tiny_choice"}]))


def test_a_template_the_tokenizer_lacks(step: Step, model_path: Path, tmp_path: Path) -> None:
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
    """`mine`, a changed tiny_generate in `folder`: the parts of a section that evaluates it."""
    folder.mkdir(exist_ok=True)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}}}
    task = GENERATE | data | {"task": "mine"} | changes
    (folder / "mine.yaml").write_text(yaml.safe_dump(task).replace("'!function u.run_it'", "!function u.run_it"))
    (folder / "u.py").write_text(RUN)
    return {"tasks": [{"task": "mine"}], "include_path": str(folder)}


@pytest.mark.usefixtures("own_tasks_only")
def test_code_that_the_model_wrote_runs_where_that_is_confirmed(
    step: Step, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a group; refused before the task's own Python is imported, whatever the user's environment says."""
    metric = [{"metric": "!function u.run_it", "aggregation": "mean", "higher_is_better": True}]
    section = own_task(tmp_path / "unsafe", world, unsafe_code=True, metric_list=metric, filter_list=None)
    (tmp_path / "unsafe" / "group.yaml").write_text("group: whole\ntask: [mine]\n")
    metrics = run(step(**section, options={"confirm_run_unsafe_code": True, "limit": 2}))
    assert [row["value"] for row in metrics["results"]] == [1.0]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (tmp_path / "unsafe" / "u.py").write_text("raise SystemExit('imported')")
    for name in ("mine", "whole"):
        with pytest.raises(UserError, match=rf"tasks\.0\.task: {name} runs .*options\.confirm_run_unsafe_code: true"):
            run(step(**section | {"tasks": [{"task": name}]}))


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric_list": [{"metric": "org/metric"}]}, "'org/metric' is a metric that evaluate loads from the hub"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "set trust_remote_code: true on the stage"),
        ({"generation_kwargs": {"custom_generate": "org/x", "trust_remote_code": True}}, "mine sets custom_generate"),
    ],
)
def test_code_that_a_task_file_fetches(
    step: Step, world: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run(step(**own_task(tmp_path / "foreign", world, **changes)))


class Killed(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_evaluation_goes_on(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers it has, to the very bytes of one that was not interrupted."""
    tasks = [own_data("tiny_choice", num_fewshot=1), own_data("tiny_generate")]
    options = {"batch_size": 4, "bootstrap_iters": 10}
    whole = step(tasks=tasks, options=options)
    expected = run(whole)

    batches = 0
    for name in ("_model_call", "_model_generate"):
        made = getattr(HFLM, name)

        def counted(*arguments: Any, made: Any = made, **settings: Any) -> Any:
            nonlocal batches
            batches += 1
            if batches == dies_at:
                raise Killed
            return made(*arguments, **settings)

        monkeypatch.setattr(HFLM, name, counted)
    dies_at = 0
    run(step(tasks=tasks, options=options))
    needed = batches
    assert needed > 15
    context = step(tasks=tasks, options=options)
    for dies_at in (4, needed // 2, 5):  # of what each attempt has left
        batches = 0
        with pytest.raises(Killed):
            run(replace(context, scratch=context.scratch / str(dies_at)))
    batches = dies_at = 0
    seen: list[tuple[int, int, str]] = []
    going_on = replace(context, progress=lambda *state: seen.append(state))
    assert {**run(going_on), "seconds": 0} == {**expected, "seconds": 0}
    assert batches == needed - 3 - (needed // 2 - 1) - 4
    assert seen[-1][0] == seen[-1][1] == max(total for _, total, _ in seen)
    for file in whole.out.iterdir():
        assert file.read_bytes() == (context.out / file.name).read_bytes(), file.name


def test_sampled_answers_are_drawn_anew(step: Step) -> None:
    """Of repeats of one request each is another one, and none is taken from those kept."""
    options = {"gen_kwargs": {"do_sample": True, "temperature": 1.5}, "limit": 3}
    context = step(tasks=[own_data("tiny_generate")], options=options, seed=3)
    run(context)
    first = (context.out / "samples_tiny_generate.jsonl").read_text()
    run(context)
    assert (context.out / "samples_tiny_generate.jsonl").read_text() == first, "by the seed"


@pytest.mark.parametrize("name", ["whole", "all_parts", "mmlu_astronomy"])
def test_a_copy_of_the_data_set_serves_a_group_a_tag_and_a_task(step: Step, tmp_path: Path, name: str) -> None:
    """Scores are those of tasks that name the copy themselves; mmlu_astronomy is lm-eval's own, asked of our rows."""
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
    group: dict[str, Any] = {"group": "whole", "task": [f"part_{subset}" for subset in subsets]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "whole.yaml").write_text(yaml.safe_dump(group))
    context = step(tasks=[{"task": name, "num_fewshot": 2, "dataset": str(copy)}], include_path=str(folder))
    metrics = run(context)
    found = scores(metrics)
    if name == "mmlu_astronomy":
        samples = [json.loads(line) for line in (context.out / "samples_mmlu_astronomy.jsonl").open()]
        assert [sample["doc"]["question"] for sample in samples] == [f"astronomy {i}?" for i in range(8)]
        return
    parts = {f"part_{subset}" for subset in subsets}
    assert {task for task, _ in found} == parts | ({"whole"} if name == "whole" else set())
    for subset in subsets:
        named = {"include": str(folder / f"{subset}.yaml"), "task": f"part_{subset}", "dataset_path": str(copy)}
        alone = tmp_path / f"{subset}"
        alone.mkdir()
        (alone / "task.yaml").write_text(yaml.safe_dump(named))
        reference = run(step(tasks=[{"task": f"part_{subset}", "num_fewshot": 2}], include_path=str(alone)))
        expected = scores(reference)
        assert {key: value for key, value in found.items() if key[0] == f"part_{subset}"} == expected
