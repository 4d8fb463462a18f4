"""`run-recipe --prefetch` as a user calls it, from a hub on this machine; then the run, where there is no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import COMMIT, serving
from tests.pipeline.run.test_command import environment

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: org/tiny
stages:
  wit:
    kind: sft
    data: {train: org/rows}
    weights: {prompt: 0.2, completion: 0.8}
    train: {max_steps: 1, per_device_train_batch_size: 2}
  bench:
    kind: lm_eval
    models: [wit]
    include_path: ./tasks
    tasks: [{task: hub_items}]
"""
TASK = """\
task: hub_items
dataset_path: org/items
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: [" yes", " no"]
metric_list: [{metric: acc}]
"""
NO_NETWORK = ["unshare", "--map-root-user", "--net"]
CONNECTS = "import socket; socket.create_connection(('127.0.0.1', {}), 5)"


def call(folder: Path, *arguments: str, before: list[str] = [], **variables: str) -> subprocess.CompletedProcess[str]:  # noqa: B006
    environ = environment() | {"HF_HOME": str(folder / "hf"), **variables}
    command = [*before, sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environ, check=False)


@pytest.fixture
def world(tmp_path: Path, model_folder: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "hub_items.yaml").write_text(TASK)
    hub = tmp_path / "hub"
    shutil.copytree(model_folder, hub / "tiny")
    rows = [{"prompt": f"{number}? ", "completion": "yes"} for number in range(4)]
    items = [{"question": f"{number}?", "answer": number % 2} for number in range(4)]
    for name, split, lines in (("rows", "train", rows), ("items", "test", items)):
        (hub / name).mkdir()
        (hub / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_what_was_prefetched_runs_without_a_network(world: Path) -> None:
    """Model, data and a benchmark's own data set lie on a hub, by branch. The run has its own name space without any
    network where the system allows that, and finds nobody at the hub's address in any case."""
    hub = {f"{kind}/org/{name}": world / "hub" / name for kind, name in KINDS}
    with serving(hub) as address:
        done = call(world, "--prefetch", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"org/tiny@{COMMIT}" in done.stdout
        assert "bench: task hub_items: data set org/items" in done.stdout
        assert done.stdout.endswith("with HF_HUB_OFFLINE=1 it now runs without a network\n")
        pushed = ("--set", "stages.up={kind: push, model: wit, repo: me/it}")
        said = call(world, "--prefetch", *pushed, HF_ENDPOINT=address, HF_HUB_OFFLINE="0").stdout
        assert "still needs a network: up: uploads the model to me/it on the hub" in said
        assert said.endswith("now runs without a network, except for the above\n")
        said = call(world, "--prefetch", "--stage", "wit", HF_ENDPOINT=address, HF_HUB_OFFLINE="0").stdout
        assert said.endswith("the selection now runs without a network\n")
    assert not (world / "runs" / "small").exists()
    cut_off = [] if subprocess.run([*NO_NETWORK, "true"], check=False, capture_output=True).returncode else NO_NETWORK
    port = address.rpartition(":")[2]
    assert subprocess.run([*cut_off, sys.executable, "-c", CONNECTS.format(port)], capture_output=True).returncode
    done = call(world, before=cut_off, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr + done.stdout
    manifest = json.loads((world / "runs" / "small" / "wit" / "stage.json").read_text())
    assert manifest["inputs"]["model"]["reference"] == f"org/tiny@{COMMIT}"
    assert manifest["inputs"]["train"]["reference"] == f"org/rows@{COMMIT}"
    scores = json.loads((world / "runs" / "small" / "bench[wit]" / "results.json").read_text())
    assert scores["n-samples"]["hub_items"]["effective"] == 4
    for damaged in ("model.safetensors", "config.json", "train.jsonl"):
        (file,) = (world / "hf" / "hub").glob(f"*/snapshots/*/{damaged}")
        content = file.read_bytes()
        file.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused = call(world, "--force", "wit", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
        assert refused.returncode == 2
        assert f"{file.resolve()} of the hub's cache was changed after it was fetched; delete it" in refused.stderr
        file.resolve().write_bytes(content)


KINDS = [("models", "tiny"), ("datasets", "rows"), ("datasets", "items")]


def test_the_items_by_which_a_training_selects_are_fetched(world: Path) -> None:
    recipe = (
        RECIPE.partition("  bench:")[0]
        + "    select: {task: hub_items, metric: acc, include_path: ./tasks, every: 1}\n"
    )
    (world / "r.yaml").write_text(recipe)
    with serving({f"{kind}/org/{name}": world / "hub" / name for kind, name in KINDS}) as address:
        done = call(world, "--prefetch", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "wit: task hub_items: data set org/items" in done.stdout


def test_without_a_network_nothing_is_prefetched_and_each_reference_is_named(world: Path) -> None:
    done = call(world, "--prefetch", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == 2
    model, rows = done.stderr.splitlines()
    assert "r.yaml:2" in model
    assert "org/tiny: cannot be fetched from the hub" in model
    assert "org/rows: cannot be fetched from the hub" in rows
