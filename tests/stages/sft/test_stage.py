"""The sft stage through the command: files in, a model, counts and messages out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.pipeline.run.test_command import command

pytestmark = pytest.mark.long

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(10)
]
RECIPE = """\
name: small
model: ./model
stages:
  wit:
    kind: sft
    data: {{train: ./rows.jsonl, eval: ./rows.jsonl{data}}}
    weights: {{prompt: 0.2, completion: 0.8{weights}}}
    train: {{max_steps: {steps}, per_device_train_batch_size: 2, learning_rate: {rate}, logging_steps: 1{train}}}
{more}
"""
SECOND = """\
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_steps: 2, per_device_train_batch_size: 2}
"""


def run(folder: Path, model: Path, rows: list[Any], **parts: str) -> subprocess.CompletedProcess[str]:
    """Run RECIPE with `parts` filled in on `rows`."""
    if not (folder / "model").exists():
        shutil.copytree(model, folder / "model")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    defaults = {"data": "", "weights": "", "train": "", "more": "", "rate": "1.0e-3", "steps": "3"}
    (folder / "r.yaml").write_text(RECIPE.format(**defaults | parts))
    return command(folder)


def metrics(folder: Path, step: str = "wit") -> dict[str, Any]:
    return json.loads((folder / "runs" / "small" / step / "stage.json").read_text())["metrics"]


def test_bad_rows_are_dropped_counted_and_listed(tmp_path: Path, model_folder: Path) -> None:
    """A line that is not JSON, a row without an answer, a row truncated before its answer: a message for each."""
    late = {"messages": [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}]}
    rows = ["{not json", *ROWS, {"messages": [{"role": "user", "content": "alone"}]}, late]
    parts = {"data": ", on_bad_row: drop", "weights": ", template: 0", "train": ", max_length: 60"}
    done = run(tmp_path, model_folder, rows, **parts)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "train data: 2 rows that cannot be used were dropped; dropped_rows.txt lists them" in done.stdout
    counts = metrics(tmp_path)["data"]["train"]
    text = "user: " + "x" * 80 + "\nassistant: y<end>\n"
    assert counts["tokens_truncated"] == len(text) - len("<end>") + 1 - 60
    assert (counts["rows"], counts["rows_used"], counts["rows_bad"]) == (13, 11, 2)  # the last row keeps its prompt
    assert "train data: 1 rows lost their completion at max_length" in done.stdout
    listed = (tmp_path / "runs/small/wit/dropped_rows.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["rows.jsonl:1", "rows.jsonl:12"] * 2  # train and eval
    assert "has no assistant message" in listed[1]


def test_what_nothing_reads_is_named(tmp_path: Path, model_folder: Path) -> None:
    """A column, a template variable and a key of a message that the template does not mention."""
    row = {"messages": [{**message, "mood": "x"} for message in ROWS[0]["messages"]], "id": 1}
    done = run(tmp_path, model_folder, [row | {"chat_template_kwargs": {"enabel_thinking": False}}], steps="1")
    assert done.returncode == 0, done.stderr + done.stdout
    names = "id, chat_template_kwargs.enabel_thinking, messages.mood"
    assert f"train data: columns not read: {names}" in " ".join(done.stdout.split())


def test_text_that_reads_as_json_is_text(tmp_path: Path, model_folder: Path) -> None:
    """Answers that are numbers or JSON are learnt character by character: the byte tokenizer gives a token for each and
    one at the end. The first token of a row is never predicted."""
    answers = ["5", "1e5", "true", "null", '{"a": 1}', "[1, 2]", '"quoted"', "plain"]
    rows = [{"prompt": prompt, "completion": answer} for answer in answers for prompt in ("Say it: ", "42")]
    done = run(tmp_path, model_folder, rows)
    assert done.returncode == 0, done.stderr + done.stdout
    assert metrics(tmp_path)["data"]["train"]["weighted"] == {
        "prompt": len(answers) * (len("Say it: ") - 1 + len("42") - 1),
        "completion": 2 * sum(len(answer) + 1 for answer in answers),
    }


def test_bad_rows_are_errors_before_anything_runs(tmp_path: Path, model_folder: Path) -> None:
    done = run(tmp_path, model_folder, [*ROWS, {"messages": [{"role": "user", "content": "alone"}]}])
    assert done.returncode == 2
    assert f"{tmp_path / 'rows.jsonl'}:11: column 'messages' has no assistant message" in done.stderr
    assert not (tmp_path / "runs" / "small").exists()


def test_packing_from_a_recipe_and_one_preparation_for_all_weights(tmp_path: Path, model_folder: Path) -> None:
    done = run(tmp_path, model_folder, ROWS, train=", packing: true, max_length: 90", more=SECOND)
    assert done.returncode == 0, done.stderr + done.stdout
    prepared = [path for path in (tmp_path / "runs/cache/prepared").iterdir() if path.is_dir()]
    assert len(prepared) == 2  # at max_length 90, once for train and eval; and at TRL's own max_length
    run(tmp_path, model_folder, ROWS, train=", packing: true, max_length: 90", weights=", system: 0.5", more=SECOND)
    assert len([path for path in (tmp_path / "runs/cache/prepared").iterdir() if path.is_dir()]) == 2
    text = [f"user: {n} and {n}?\nassistant: It is {2 * n}." for n in range(10)]
    assert metrics(tmp_path)["data"]["train"]["tokens"] == sum(len(row) + 2 for row in text)  # <end>, line end
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/small/wit")


def test_the_log_has_prompt_and_completion_losses(tmp_path: Path, model_folder: Path) -> None:
    assert run(tmp_path, model_folder, ROWS).returncode == 0
    log = [json.loads(line) for line in (tmp_path / "runs/small/wit/training_log.jsonl").read_text().splitlines()]
    steps = [row for row in log if "loss" in row]
    assert len(steps) == 3
    for row in steps:
        assert {"prompt_loss", "completion_loss", "mean_token_accuracy", "weighted_tokens/template"} <= row.keys()
        assert row["loss"] < row["prompt_loss"]  # the weights are below 1
    last = next(row for row in log if "eval_loss" in row)
    assert {"eval_prompt_loss", "eval_completion_loss", "eval_weighted_tokens/completion"} <= last.keys()


def test_a_training_that_diverges_names_its_rows(tmp_path: Path, model_folder: Path) -> None:
    wild = ", lr_scheduler_type: constant, max_grad_norm: 0, optim: sgd"
    done = run(tmp_path, model_folder, ROWS, rate="1.0e+30", steps="9", train=wild)
    assert done.returncode == 1
    assert re.search(r"step \d: the loss is not finite at learning rate 1e\+30", done.stdout)
    assert "check the data rows: " in done.stdout


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": ", packing: true, max_length: null"}, "train.packing fills rows up to train.max_length"),
        ({"train": ", packing_strategy: wrapped"}, "examples are packed whole"),
        ({"more": "    random_init: true\n    lora: {r: 2}"}, "random_init draws all weights"),
        ({"weights": ", template: -1"}, "stages.wit.weights.template"),
        ({"data": ", turns: first"}, "stages.wit.data.turns"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, model_folder: Path, parts: dict[str, str], message: str) -> None:
    done = run(tmp_path, model_folder, ROWS, **parts)
    assert done.returncode == 2
    assert message in done.stderr
    assert "r.yaml:" in done.stderr
