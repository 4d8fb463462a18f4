"""The command on a small recipe, with everything real: worker processes, trainers, lm-eval, the report."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
stages:
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: &train {max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1}
  wit:
    kind: sft
    data: {train: ./rows.jsonl, eval: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: *train
    lora: {r: 2, target_modules: [q_proj, v_proj]}
  dpo:
    kind: dpo
    model: wit
    data: {train: ./rows.jsonl, rejected: other_row}
    train: *train
  bench:
    kind: lm_eval
    models: [base, it, wit, dpo]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  report: {kind: report}
"""
ROWS = [("Sky? ", "blue"), ("Grass? ", "green"), ("Snow? ", "white"), ("Coal? ", "black")]
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [blue, green, white, black]
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
STEPS = ["it", "wit", "dpo", "bench[base]", "bench[it]", "bench[wit]", "bench[dpo]", "report"]


def write_world(folder: Path, model: Path) -> None:
    """The recipe's files in `folder`."""
    shutil.copytree(model, folder / "model")
    (folder / "r.yaml").write_text(RECIPE)
    for name in ("pipeline", "stages"):  # a user's own folders of these names are not ours
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(TASK)
    items = [json.dumps({"question": prompt, "answer": i}) for i, (prompt, _) in enumerate(ROWS)]
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`run-recipe r.yaml ARGUMENTS` in `folder`, as a user calls it."""
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", *arguments]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=300, env=environment(), check=False)


def environment() -> dict[str, str]:
    """The variables of a command that finds this clone, and packages where this process finds them."""
    paths = [str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def states(folder: Path) -> dict[str, str]:
    """Step -> state of the last run."""
    record = json.loads((folder / "runs" / "small" / "run.json").read_text())
    return {step["step"]: step["state"] for step in record["steps"]}


def plan(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Step -> what `--plan --json` says of it."""
    done = command(folder, "--plan", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {step["step"]: step for step in json.loads(done.stdout)["steps"]}


def to_go_on(said: str) -> list[str]:
    """The arguments of the command that the last line of `said` shows."""
    return shlex.split(said.strip().splitlines()[-1].removeprefix("  run-recipe r.yaml"))


def to_run(folder: Path, *arguments: str) -> set[str]:
    return {name for name, step in plan(folder, *arguments).items() if step["state"] == "run"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder in which the whole recipe ran once."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, model_folder)
    done = command(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "first.txt").write_text(done.stdout)
    return folder


def test_everything_ran_and_was_recorded(world: Path) -> None:
    assert states(world) == dict.fromkeys(STEPS, "done")
    for name in STEPS:
        folder = world / "runs" / "small" / name
        manifest = json.loads((folder / "stage.json").read_text())
        assert set(manifest) == {
            *("schema", "step", "kind", "recipe", "version", "fingerprint", "config", "inputs", "outputs", "metrics"),
            *("environment", "started", "seconds", "sha256"),
        }
        assert folder.resolve() == world / "runs" / "store" / manifest["kind"] / manifest["fingerprint"]
        assert manifest["outputs"]
    assert not list((world / "runs" / "store" / "unfinished").iterdir())
    logs = [log.read_text() for log in (world / "runs" / "small" / "logs").iterdir()]
    assert len(logs) == len(STEPS)
    assert not any("Fatal Python error" in log or "Traceback" in log for log in logs)


def test_what_a_training_says_of_itself(world: Path) -> None:
    """3 steps of 2 rows: all four rows, of 10, 13, 12 and 12 tokens with their EOS, and two of them again."""
    metrics = json.loads((world / "runs" / "small" / "it" / "stage.json").read_text())["metrics"]
    data = metrics["data"]["train"]
    assert (metrics["steps"], data["rows"], data["rows_used"], data["tokens"]) == (3, 4, 4, 47)
    assert 47 + 22 <= metrics["tokens"] <= 47 + 25
    log = (world / "runs" / "small" / "it" / "training_log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    assert len(losses) == 3
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 3)


def test_the_results_are_shown_and_written(world: Path) -> None:
    said = (world / "first.txt").read_text()
    assert "colours" in said
    assert re.search(r"runs/small/report/report\.html", said)
    report = world / "runs" / "small" / "report"
    assert {"report.html", "report.md", "results.csv"} <= {file.name for file in report.iterdir()}
    with (report / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = {row["model"]: (row["stage"], row["prompt_weight"], row["completion_weight"]) for row in rows}
    assert scores["base"] == ("base", "", "")
    assert (scores["it"][0], float(scores["it"][1]), float(scores["it"][2])) == ("sft", 0, 1)
    assert (scores["dpo"][0], float(scores["dpo"][1]), float(scores["dpo"][2])) == ("dpo", 0.2, 0.8)
    own = json.loads((world / "runs" / "small" / "bench[wit]" / "results.json").read_text())
    value = next(float(r["value"]) for r in rows if r["model"] == "wit" and r["metric"].startswith("acc"))
    assert value == own["results"]["colours"]["acc,none"]


def test_published_models_load_as_they_are(world: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("it", "wit", "dpo"):
        folder = world / "runs" / "small" / name
        AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.num_parameters() > 0
    assert (world / "runs" / "small" / "wit" / "adapter" / "adapter_config.json").is_file()


def test_nothing_runs_twice(world: Path) -> None:
    done = command(world)
    assert done.returncode == 0, done.stderr
    assert states(world) == dict.fromkeys(STEPS, "cached")
    assert "colours" in done.stdout


def test_a_recipe_of_the_same_name_says_that_it_takes_over(world: Path) -> None:
    """Two files of one name share a record, and so whatever shows or joins the run."""
    shutil.copy(world / "r.yaml", world / "second.yaml")
    call = [sys.executable, "-P", "-m", "pipeline.cli", "second.yaml"]
    done = subprocess.run(call, cwd=world, capture_output=True, text=True, env=environment(), check=True)
    assert "small was the name of r.yaml, whose record this run replaces; rename one" in done.stdout
    assert json.loads((world / "runs/small/run.json").read_text())["recipe_file"] == "second.yaml"
    assert "small was the name of second.yaml" in command(world).stdout
    assert "was the name of" not in command(world).stdout


def test_plan_says_what_depends_on_what_changed(world: Path) -> None:
    assert to_run(world) == set()
    changed = to_run(world, "--set", "stages.wit.weights.prompt=0.4")
    assert changed == {"wit", "dpo", "bench[wit]", "bench[dpo]", "report"}
    assert to_run(world, "--set", "stages.dpo.train.beta=0.5") == {"dpo", "bench[dpo]", "report"}
    steps = plan(world)
    assert steps["bench[dpo]"]["needs"] == ["dpo"]
    assert {name: step["kind"] for name, step in steps.items()}["dpo"] == "dpo"


def test_fingerprints_are_of_content_alone(world: Path, tmp_path: Path) -> None:
    """Moved, its keys reordered, its files touched: the same steps. One byte of data: other steps."""
    before = {name: step["fingerprint"] for name, step in plan(world).items()}
    moved = tmp_path / "elsewhere"
    shutil.copytree(world, moved, symlinks=True, copy_function=shutil.copyfile)
    head, stages = RECIPE.split("stages:\n")
    (moved / "r.yaml").write_text("stages:\n" + stages + head)
    assert {name: step["fingerprint"] for name, step in plan(moved).items()} == before
    assert to_run(moved) == set()
    with (moved / "rows.jsonl").open("a") as file:
        file.write("\n")
    after = {name: step["fingerprint"] for name, step in plan(moved).items()}
    assert {name for name in before if after[name] != before[name]} == set(STEPS) - {"bench[base]"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("model/model.safetensors", set(STEPS)),
        ("items.jsonl", {"bench[base]", "bench[it]", "bench[wit]", "bench[dpo]", "report"}),
        ("tasks/colours.yaml", {"bench[base]", "bench[it]", "bench[wit]", "bench[dpo]", "report"}),
        ("r.yaml", set()),
    ],
)
def test_one_byte_reruns_what_depends_on_it(world: Path, tmp_path: Path, changed: str, expected: set[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world, folder, symlinks=True)
    content = bytearray((folder / changed).read_bytes())
    content[-2] ^= 1
    (folder / changed).write_bytes(b"# a remark\n" + (world / changed).read_bytes() if not expected else content)
    assert to_run(folder) == expected


def test_plan_says_which_values_changed(world: Path) -> None:
    steps = plan(world, "--set", "stages.wit.weights.prompt=0.4", "--set", "stages.dpo.train.beta=0.5")
    assert steps["wit"]["why"] == "stages.wit.weights.prompt 0.2 -> 0.4"
    assert steps["dpo"]["why"] == "stages.dpo.train.beta unset -> 0.5; after wit"
    assert steps["bench[wit]"]["why"] == "after wit"
    assert steps["it"]["why"] == ""
    steps = plan(world, "--set", "stages.it.data.train=./items.jsonl")
    assert steps["it"]["why"] == "stages.it.data.train: rows.jsonl -> items.jsonl"
    (world / "sub").mkdir(exist_ok=True)
    (world / "sub" / "rows.jsonl").write_bytes((world / "items.jsonl").read_bytes())
    steps = plan(world, "--set", "stages.it.data.train=./sub/rows.jsonl")
    assert steps["it"]["why"] == "stages.it.data.train: rows.jsonl has other content"
    steps = plan(world, "--set", "stages.wit.model=dpo", "--set", "stages.dpo.model=it")
    assert steps["dpo"]["why"] == "stages.dpo.model: wit -> it"


def test_plan_compares_only_with_results_of_the_recipe(world: Path) -> None:
    steps = plan(world, "--set", "name=other", "--set", "stages.wit.weights.prompt=0.4")
    assert steps["it"]["why"] == ""
    assert steps["wit"]["why"] == "no result yet"


def test_stage_from_and_force(world: Path) -> None:
    assert to_run(world, "--stage", "wit") == {"wit"}
    assert to_run(world, "--stage", "bench[it]") == {"bench[it]"}
    assert to_run(world, "--force", "dpo") == {"dpo"}
    assert to_run(world, "--from", "dpo") == {"dpo", "bench[dpo]", "report"}
    before = json.loads((world / "runs" / "small" / "it" / "stage.json").read_text())
    done = command(world, "--stage", "it")
    assert done.returncode == 0, done.stderr
    after = json.loads((world / "runs" / "small" / "it" / "stage.json").read_text())
    assert states(world)["it"] == "done"
    assert set(states(world).values()) == {"done", "cached"}
    assert after["started"] > before["started"]
    assert after["outputs"]["model.safetensors"] == before["outputs"]["model.safetensors"]
    assert to_run(world) == set(), "the model came out the same, so what was made from it still stands"


def test_a_damaged_result_is_made_again(world: Path) -> None:
    weights = world / "runs" / "small" / "bench[it]" / "results.json"
    weights.write_text(weights.read_text() + " ")
    done = command(world)
    assert done.returncode == 0, done.stderr
    assert states(world)["bench[it]"] == "done"
    assert "damaged: results.json was changed" in done.stdout
    assert to_run(world) == set()


def test_json_alone_on_standard_output(world: Path) -> None:
    done = command(world, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"


def test_a_failed_stage_stops_only_what_needs_it(world: Path) -> None:
    """At a learning rate of 1e30 the training diverges."""
    diverging = ["--set", "stages.wit.train.learning_rate=1.0e+30", "--set", "stages.wit.lora=null"]
    done = command(world, *diverging)
    assert done.returncode == 1
    outcome = states(world)
    assert outcome["wit"] == "failed"
    assert {name for name, state in outcome.items() if state == "skipped"} == {
        "dpo",
        "bench[wit]",
        "bench[dpo]",
        "report",
    }
    assert outcome["it"] == outcome["bench[it]"] == "cached"
    assert "the loss is not finite" in done.stdout
    log = re.search(r"log: (.*)", done.stdout)
    assert log
    assert Path(log[1]).is_file()
    assert "Traceback" not in done.stderr
    words = to_go_on(done.stdout)
    assert words == diverging
    assert to_run(world, *words) == {"wit", "dpo", "bench[wit]", "bench[dpo]", "report"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(world: Path, sent: signal.Signals) -> None:
    """Ctrl-C, or being asked to end: exit 130 within 5 s, no worker left, nothing half-made taken for a result."""
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--set", "stages.it.train.max_steps=5000"]
    process = subprocess.Popen(
        call, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    log = world / "runs" / "small" / "logs" / "it.txt"
    log.unlink(missing_ok=True)
    deadline = time.monotonic() + 300
    while not (log.exists() and "'loss'" in log.read_text()):
        assert time.monotonic() < deadline, "training never began"
        time.sleep(0.2)
    process.send_signal(sent)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert "Traceback" not in errors
    assert states(world)["it"] == "interrupted"
    assert re.search(r"interrupted: 0 of 8 steps done, .*; to continue:\n  run-recipe", errors)
    assert to_go_on(errors) == call[5:]
    assert "it" in to_run(world, "--set", "stages.it.train.max_steps=5000")


TWINS = """\
name: twins
model: ./model
stages:
  one: &same
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.5, completion: 0.5}
    train: {max_steps: 2, per_device_train_batch_size: 2}
  two: *same
"""


def test_equal_steps_are_made_once(tmp_path: Path, model_folder: Path) -> None:
    """Side by side or not, two stages of one content are one result."""
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(TWINS)
    done = command(tmp_path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "runs" / "twins" / "run.json").read_text())["steps"]
    assert [step["state"] for step in steps] == ["done", "cached"]
    assert steps[0]["path"] == steps[1]["path"]
    assert (tmp_path / "runs" / "twins" / "two").resolve() == (tmp_path / "runs" / "twins" / "one").resolve()


def test_data_that_changes_under_a_running_step(tmp_path: Path, model_folder: Path) -> None:
    """What was trained on other data than its fingerprint says is no result."""
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(TWINS)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--stage", "one"]
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment())
    log = tmp_path / "runs" / "twins" / "logs" / "one.txt"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Sea? ", "completion": "blue"}) + "\n")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rows.jsonl was changed while the step ran" in said
    assert not list((tmp_path / "runs" / "store").glob("sft/*"))


def test_a_store_that_is_deleted_under_a_running_step(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(TWINS)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--stage", "one"]
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment())
    while not (tmp_path / "runs" / "twins" / "logs" / "one.txt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    shutil.rmtree(tmp_path / "runs" / "store")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"failed one: .*/runs/store/unfinished/\w+ was deleted while the step ran; run the command", said)
    assert "Traceback" not in said


def test_planning_imports_nothing_heavy(world: Path) -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['r.yaml', '--plan']); "
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=world, capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
