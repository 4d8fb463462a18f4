"""Published models in transformers, PEFT, lm-eval's own command, TensorBoard and a local hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.pipeline.run.test_command import environment, write_world
from tests.stages.push.server import TOKEN, Hub, serving

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
name: small
model: ./model
matrix: {prompt: [0.25]}
stages:
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-2, logging_steps: 1}
    lora: {r: 2, target_modules: [q_proj, v_proj]}
  wit:
    kind: sft
    data: {train: ./rows.jsonl, eval: ./rows.jsonl}
    weights: {prompt: "${matrix.prompt}", completion: 0.75}
    train:
      {max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, report_to: [tensorboard], save_steps: 9}
  dpo:
    kind: dpo
    model: wit
    data: {train: ./rows.jsonl, rejected: other_row}
    train: {max_steps: 1, per_device_train_batch_size: 2, report_to: tensorboard, run_name: mine}
  bench:
    kind: lm_eval
    models: [it, wit]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  publish: {kind: push, model: wit, repo: lab/wit-small, results: [bench], license: apache-2.0}
"""
WIT, DPO = "wit[prompt=0.25]", "dpo[prompt=0.25]"


@dataclass(frozen=True)
class World:
    """A folder in which the recipe ran once, and the hub it pushed to."""

    folder: Path
    hub: Hub
    output: str

    def run(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run `run-recipe r.yaml ARGUMENTS` with changed environment variables."""
        hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=400,
            env={**environment(), **hub, "HF_HOME": str(self.folder / "hf"), **changed},
            check=False,
        )

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "small"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("published")
    write_world(folder, model_folder)
    (folder / "r.yaml").write_text(RECIPE)
    with serving() as hub:
        process = World(folder, hub, "").run()
        assert process.returncode == 0, process.stdout + process.stderr
        yield World(folder, hub, process.stdout)


# -------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("step", ["it", WIT])
def test_transformers_loads_it(world: World, step: str) -> None:
    folder = world.runs / step
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Sky? "}]
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    answer = generator(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer[:1] == messages
    prompt = tokenizer("user: Sky? \nassistant:", return_tensors="pt").input_ids  # the chat template's text
    for _ in range(4):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    assert answer[1]["role"] == "assistant"
    assert answer[1]["content"] == tokenizer.decode(prompt[0, -4:], skip_special_tokens=True)


def test_peft_loads_the_adapter_on_the_base_model(world: World) -> None:
    """The base model with the adapter equals the merged model, up to rounding."""
    base = AutoModelForCausalLM.from_pretrained(world.folder / "model")
    adapted = PeftModel.from_pretrained(base, str(world.runs / "it"), subfolder="adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(world.runs / "it")
    tokens = torch.arange(40, 60)[None]
    assert (adapted(tokens).logits - merged(tokens).logits).abs().max() < 1e-4
    with adapted.disable_adapter():
        assert (adapted(tokens).logits - merged(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("step", ["it", WIT])
def test_lm_eval_s_own_command_loads_it(world: World, tmp_path: Path, step: str) -> None:
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={world.runs / step}", "--limit", "2", "--tasks", "pocket_knowledge"]
    command += ["--include_path", "recipes/pocket/tasks", "--output_path", str(tmp_path), "--apply_chat_template"]
    env = {**environment(), "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["n-samples"]["pocket_knowledge"]["effective"] == 2
    assert results["results"]["pocket_knowledge"]["acc,none"] in (0, 0.5, 1)


# ----------------------------------------------------------------------------------------------------- card


def test_every_model_has_a_card(world: World) -> None:
    metrics = json.loads((world.runs / WIT / "stage.json").read_text())["metrics"]
    text = (world.runs / WIT / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["weighted-instruction-tuning", "sft", "trl"],
    }
    section = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert section["weights"] == {"prompt": 0.25, "completion": 0.75}
    assert (section["model"], section["data"]["train"], section["data"]["eval"]) == ("model", *["rows.jsonl"] * 2)
    assert section["train"] == {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    assert f"| train_loss | {metrics['train_loss']:.4g} |" in text
    assert f"| eval_loss | {metrics['eval_loss']:.4g} |" in text
    assert "| train: `rows.jsonl` | 4 |" in text
    assert "2507.07817" in text
    assert str(world.folder) not in text
    dpo_card = (world.runs / DPO / "README.md").read_text()
    assert "### 1. WIT (0.25, 0.75)" in dpo_card
    assert "### 2. DPO" in dpo_card
    assert 'subfolder="adapter"' in (world.runs / "it" / "README.md").read_text()


def test_a_card_has_hub_ids_but_no_paths_and_machines(tmp_path: Path) -> None:
    from stages.base import Input
    from stages.records.metrics import Metrics
    from stages.training.model_card import card

    config = {
        "data": {"train": "o/d@main", "eval": "/home/me/secret/rows.jsonl"},
        "weights": {"prompt": 0.5, "completion": 1.0},
        "train": {"learning_rate": 1e-5, "run_name": "mine"},
        "launch": {"num_processes": 2, "main_process_ip": "10.0.0.7"},
    }
    references = {"model": f"org/base@{'a' * 40}", "train": "o/d@b#x.jsonl", "eval": "rows.jsonl"}
    inputs = {name: Input(tmp_path, reference=reference) for name, reference in references.items()}
    text = card(Input(tmp_path, "s", "sft", "", config, Metrics(train_loss=1.5), inputs))
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("org/base", ["o/d"])
    for hidden in ("secret", "10.0.0.7", "mine"):
        assert hidden not in text
    assert "num_processes: 2" in text


# ------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_shows_the_steps_side_by_side(world: World) -> None:
    folder = world.runs / "logs" / "tensorboard"
    assert {path.name for path in folder.iterdir()} == {WIT, DPO}
    events = EventAccumulator(str(folder / WIT)).Reload()
    rows = [json.loads(line) for line in (world.runs / WIT / "training_log.jsonl").read_text().splitlines()]
    for name in ("loss", "prompt_loss", "completion_loss", "learning_rate"):
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert len(expected) == 3
        assert {e.step: e.value for e in events.Scalars(f"train/{name}")} == pytest.approx(expected)
    (evaluation,) = (row for row in rows if "eval_loss" in row)
    (event,) = events.Scalars("eval/loss")
    assert (event.step, event.value) == (3, pytest.approx(evaluation["eval_loss"]))
    config = config_of(events)
    assert (config["recipe"], config["step"], config["run_name"]) == ("small", WIT, f"small/{WIT}")
    assert (config["prompt_loss_weight"], config["completion_loss_weight"]) == (0.25, 0.75)
    assert TOKEN not in json.dumps(config)
    dpo_config = config_of(EventAccumulator(str(folder / DPO)).Reload())
    assert (dpo_config["run_name"], dpo_config["step"]) == ("mine", DPO)
    assert dpo_config["weights"] == {"prompt": 0.25, "completion": 0.75}
    assert not list((world.runs / WIT / ".").rglob("*tfevents*")), "events contain times"


def config_of(events: EventAccumulator) -> dict[str, Any]:
    (text,) = events.Tensors("args/text_summary")
    return json.loads(text.tensor_proto.string_val[0])


def test_trackers_are_no_part_of_a_fingerprint(world: World) -> None:
    changed = ["stages.wit.train.report_to=none", "stages.wit.train.run_name=other", "stages.dpo.train.run_name=x"]
    process = world.run("--plan", "--json", *(part for key in changed for part in ("--set", key)))
    assert {step["state"] for step in json.loads(process.stdout)["steps"]} == {"cached"}


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("[tensorbord]", "'tensorbord' is not a supported tracker; use none, mlflow, tensorboard"),
        ("all", "'all' is not a supported tracker"),
        ("trackio", "needs the package trackio, which is not installed; pip install trackio"),
    ],
)
def test_an_unusable_tracker(world: World, report_to: str, message: str) -> None:
    done = world.run("--set", f"stages.wit.train.report_to={report_to}", "--from", "wit")
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


# ------------------------------------------------------------------------------------------------------ hub


def test_a_push_uploads_the_model_with_its_scores(world: World) -> None:
    repo = world.hub.repos["lab/wit-small"]
    assert list(world.hub.repos) == ["lab/wit-small"], "only models of push stages"
    assert repo.private
    assert len(repo.commits) == 1
    folder = world.runs / WIT
    published = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("stage.json", "README.md"):
        del published[name]
    assert {name: content for name, content in repo.files.items() if name != "README.md"} == published
    text = repo.files["README.md"].decode()
    data = ModelCard(text).data
    (result,) = (row for row in data.eval_results if row.metric_type == "acc")
    bench = json.loads((world.runs / "bench[wit,prompt=0.25]" / "stage.json").read_text())["metrics"]["results"]
    assert result.metric_value == next(row["value"] for row in bench if row["metric"] == "acc")
    assert (result.dataset_name, data.model_name, data.license) == ("colours", "wit-small", "apache-2.0")
    assert 'model="lab/wit-small"' in text
    record = json.loads((world.runs / "publish[prompt=0.25]" / "stage.json").read_text())
    assert record["metrics"]["commit"] == repo.commits[0]
    assert record["metrics"]["url"] == f"{world.hub.url}/lab/wit-small/commit/{repo.commits[0]}"
    assert f"uploaded: {record['metrics']['url']}" in world.output
    assert "asks publish[prompt=0.25]: uploads the model to lab/wit-small on the hub, private" in world.output
    everything = [path for path in world.folder.rglob("*") if path.is_file() and "store" in path.parts]
    assert not any(TOKEN.encode() in path.read_bytes() for path in everything)


def test_what_was_pushed_loads(world: World, tmp_path: Path) -> None:
    for name, content in world.hub.repos["lab/wit-small"].files.items():
        (tmp_path / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    pushed, published = (load_file(folder / "model.safetensors") for folder in (tmp_path, world.runs / WIT))
    assert all(torch.equal(pushed[name], published[name]) for name in published)


def test_a_second_run_pushes_nothing(world: World) -> None:
    requests = len(world.hub.requests)
    done = world.run()
    assert done.returncode == 0, done.stderr
    assert len(world.hub.requests) == requests


def test_a_second_push_deletes_stale_weights(world: World) -> None:
    repo = world.hub.repos["lab/wit-small"]
    before = dict(repo.files)
    repo.files |= {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    done = world.run("--stage", "publish")
    assert done.returncode == 0, done.stderr
    assert repo.files == before | {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"HF_TOKEN": ""}, {}, "set the environment variable HF_TOKEN, or run 'hf auth login'"),
        ({"HF_TOKEN": "hf_of-somebody-else"}, {}, "answers 401"),
        ({}, {"repo": "stranger/x"}, "'stranger' is not among the owners that this token writes for: me, lab"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "cannot be used for lab/wit-small"),
        ({"HF_HUB_OFFLINE": "1"}, {}, "HF_HUB_OFFLINE is set; unset it"),
        ({}, {"repo": "no-owner"}, "stages.publish.repo"),
        ({}, {"model": "base"}, "'base' was not trained by this recipe"),
        ({}, {"model": "dpo"}, "stages.publish.results.0: 'bench' does not score dpo; name it among its models"),
    ],
)
def test_errors_before_anything_runs(
    world: World, variables: dict[str, str], settings: dict[str, str], message: str
) -> None:
    changed = [part for key, value in settings.items() for part in ("--set", f"stages.publish.{key}={value}")]
    done = world.run("--stage", "publish", *changed, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "r.yaml" in done.stderr or changed
    assert "Traceback" not in done.stderr


def test_no_two_steps_push_to_one_repository(world: World) -> None:
    """Each cell would overwrite the one before. The error says how to give each its own repository."""
    done = world.run("--plan", "--set", "matrix.prompt=[0.25, 0.5]")
    assert done.returncode == 2
    first = "publish[prompt=0.25]"
    assert f"stages.publish.repo: lab/wit-small is where {first} writes; give each its own" in done.stderr
    repo = "stages.publish.repo=lab/wit-${matrix.prompt}"
    done = world.run("--plan", "--set", "matrix.prompt=[0.25, 0.5]", "--set", repo)
    assert done.returncode == 0, done.stderr
    assert "uploads the model to lab/wit-0.5 on the hub" in done.stdout


def test_a_push_that_fails_leaves_the_model_as_it_is(world: World) -> None:
    """The hub refuses the commit; then the repository is public, but the recipe says private."""
    model = (world.runs / WIT / "model.safetensors").read_bytes()
    world.hub.refuses["/api/models/lab/wit-small/commit"] = 403
    done = world.run("--stage", "publish", "--set", "stages.publish.license=mit")
    world.hub.refuses.clear()
    assert done.returncode == 1
    assert "answers 403 for lab/wit-small" in done.stdout
    assert "the token may not write there" in done.stdout
    world.hub.repos["lab/wit-small"].private = False
    done = world.run("--stage", "publish", "--set", "stages.publish.license=mit")
    world.hub.repos["lab/wit-small"].private = True
    assert done.returncode == 1
    assert "lab/wit-small is public; set private: false, or make it private on the hub" in done.stdout
    assert (world.runs / WIT / "model.safetensors").read_bytes() == model
    assert b"license: mit" not in world.hub.repos["lab/wit-small"].files["README.md"]


def test_trl_s_own_push_is_refused_and_ours_is_named(world: World) -> None:
    done = world.run("--plan", "--set", "stages.wit.train.push_to_hub=true")
    assert done.returncode == 2
    assert "use a stage of kind push" in done.stderr
