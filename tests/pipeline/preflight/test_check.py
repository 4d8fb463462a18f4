"""`run-recipe --check` as a user calls it: every kind of error before anything runs, all together; notes on slips."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, MambaConfig, MambaForCausalLM

from tests.pipeline.run.test_command import TASK, command, write_world
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.long

SFT = """\
  {name}:
    kind: sft
    model: {model}
    data: {{train: {rows}}}
    weights: {{prompt: 0.2, completion: 1}}
    train: {{max_steps: 1, {train}}}
"""
DPO = """\
  learned_dpo:
    kind: dpo
    model: ./gpt2
    data: {train: ./rows.jsonl, rejected: other_row}
    train: {max_steps: 1, max_length: 80}
"""
BENCH = """\
  bench:
    kind: lm_eval
    models: [./plain]
    include_path: ./tasks
    tasks:
      - {task: colour, data: {test: ./items.jsonl}}
      - {task: colours, metric: accuracy, data: {test: ./items.jsonl}}
      - {task: fixed, num_fewshot: 2, data: {test: ./items.jsonl}}
      - {task: remote}
    options: {apply_chat_template: true}
"""
LONG = {"prompt": "Which colour does the sky have? ", "completion": "blue " * 10}
"""32 + 50 characters: 83 tokens with EOS, more than the 64 positions of the GPT-2."""
WRONG = {
    "precision": ("train.bf16", r"needs a GPU"),
    "halves": ("train.fp16", r"needs a GPU"),
    "tf32": ("train.tf32", r"needs a GPU"),
    "optimiser": ("train.optim", r"needs the package galore-torch, which is not installed"),
    "kernel": ("train.model_init_kwargs.attn_implementation", r"flash_attention_2 .*installed"),
    "sharded": ("launch.use_fsdp", r"on GPUs only, and this machine has none"),
    "adapter": ("lora", r"exclude_modules"),
    "short": ("train.max_length", r"every row of the train data lost its completion at max_length 4"),
    "learned": ("train.max_length", r"the longest row has 83 tokens, and the model 64 positions; set it to 64 or less"),
    "learned_dpo": ("train.max_length", r"the longest row has 80 tokens, and the model 64 positions"),
    "packed": ("train", r"lets examples in one packed row see each other"),
    "mute": ("model", r"holds no tokenizer that can be loaded"),
    "chat": ("model", r"the tokenizer has no chat template, and the rows are messages"),
    "foreign": ("data.train", r"the token id 300, but the model's ids are 0 to 257"),
    "bench.0": ("tasks.0.task", r"no task, group or tag 'colour'; did you mean colours"),
    "bench.1": ("tasks.1.metric", r"colours reports no 'accuracy', only acc"),
    "bench.2": ("tasks.2.num_fewshot", r"fixes 0 few-shot examples"),
    "bench.3": ("tasks.3.task", r"remote cannot be loaded: .*org/not-reachable.*Without a network"),
    "bench.4": ("options.apply_chat_template", r"has no chat template"),
}
"""Stage, with the number of its error -> the key that is blamed, and the reason."""


def write_models(folder: Path, model: Path) -> None:
    """Write models that cannot be trained in some way beside the tiny Llama."""
    tokenizer = byte_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    mamba = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(mamba).save_pretrained(folder / "mamba")
    for name in ("gpt2", "mamba"):
        tokenizer.save_pretrained(folder / name)
    for name in ("plain", "mute"):
        shutil.copytree(model, folder / name)
        (folder / name / "chat_template.jinja").unlink()
    for file in (folder / "mute").glob("tokenizer*"):
        file.unlink()


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> subprocess.CompletedProcess[str]:
    """Check a recipe in which every stage has one error."""
    folder = tmp_path_factory.mktemp("refused")
    write_world(folder, model_folder)
    write_models(folder, model_folder)
    (folder / "rows.jsonl").write_text(f"{json.dumps(LONG)}\n{json.dumps(LONG | {'completion': 'grey'})}\n")
    chat = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "blue"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "ids.jsonl").write_text(json.dumps({"input_ids": [5, 300, 7], "loss_weights": [1, 1, 1]}) + "\n")
    task = TASK.replace("task: colours", "task: NAME").replace("output_type", "num_fewshot: 0\noutput_type")
    (folder / "tasks" / "fixed.yaml").write_text(task.replace("NAME", "fixed"))
    remote = re.sub("dataset_path: json\ndataset_kwargs.*", "dataset_path: org/not-reachable", TASK)
    (folder / "tasks" / "remote.yaml").write_text(remote.replace("task: colours", "task: remote"))
    stages = [
        ("precision", "./model", "rows", "bf16: true"),
        ("halves", "./model", "rows", "fp16: true"),
        ("tf32", "./model", "rows", "tf32: true"),
        ("optimiser", "./model", "rows", "optim: galore_adamw, optim_target_modules: [q_proj]"),
        ("kernel", "./model", "rows", "model_init_kwargs: {attn_implementation: flash_attention_2}"),
        ("sharded", "./model", "rows", "learning_rate: 1.0e-3}\n    launch: {num_processes: 2, use_fsdp: true"),
        (
            "adapter",
            "./model",
            "rows",
            "learning_rate: 1.0e-3}\n    lora: {target_modules: [q_proj], exclude_modules: [q_proj]",
        ),
        ("short", "./model", "rows", "max_length: 4"),
        ("learned", "./gpt2", "rows", "learning_rate: 1.0e-3"),
        ("packed", "./mamba", "rows", "packing: true"),
        ("mute", "./mute", "rows", "learning_rate: 1.0e-3"),
        ("chat", "./plain", "chats", "learning_rate: 1.0e-3"),
        ("foreign", "./model", "ids", "learning_rate: 1.0e-3"),
    ]
    sections = [SFT.format(name=n, model=m, rows=f"./{r}.jsonl", train=t) for n, m, r, t in stages]
    text = "name: wrong\nstages:\n" + "".join(sections) + DPO + BENCH
    (folder / "r.yaml").write_text(text)
    return command(folder, "--check")


@pytest.mark.parametrize("error", WRONG)
def test_an_error_names_its_key_and_the_reason(refused: subprocess.CompletedProcess[str], error: str) -> None:
    key, reason = WRONG[error]
    stage = error.partition(".")[0]
    pattern = rf"^run-recipe: r\.yaml:\d+:\d+: stages\.{stage}\.{re.escape(key)}: .*{reason}"
    assert len(re.findall(pattern, refused.stderr, re.MULTILINE)) == 1, refused.stderr


def test_all_errors_are_reported_at_once(refused: subprocess.CompletedProcess[str]) -> None:
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == len(WRONG)
    assert "Traceback" not in refused.stderr


SLIPS = """\
name: slips
model: ./model
stages:
  wit: &wit
    kind: sft
    data: {train: ./rows.jsonl, eval: ./rows.jsonl}
    weights: {prompt: 20, completion: 0}
    train: {max_steps: 2, per_device_train_batch_size: 2, learning_rate: 0.1, warmup_steps: 50}
  long:
    <<: *wit
    data: {train: ./long.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_steps: 2}
  bench:
    kind: lm_eval
    models: [wit]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
"""
NOTES = {
    "wit.weights": "completion is 0",
    "wit.weights.prompt": "20 is above 1",
    "wit.train.learning_rate": "0.1 is very high",
    "wit.train.warmup_steps": "the training has 2 steps",
    "wit.data.eval": "the same content as data.train",
    "long.train": "the longest row has 301 tokens, and the model 256 positions; beyond these it extrapolates",
    "long.data.train": "columns not read: source",
    "bench.options.apply_chat_template": "the model has a chat template",
}


def test_likely_slips_are_noted_and_a_second_check_starts_no_process(tmp_path: Path, model_folder: Path) -> None:
    """The model of `long` has rotary positions, which have no end; its row has 300 characters and EOS."""
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(SLIPS)
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "p" * 100, "completion": "c" * 200, "source": "book"}) + "\n"
    )
    done = command(tmp_path, "--check")
    assert done.returncode == 0, done.stderr
    assert "checking 3 steps" in done.stdout
    notes = [line for line in done.stdout.splitlines() if line.startswith("note ")]
    assert len(notes) == len(NOTES)
    for key, text in NOTES.items():
        assert any(re.match(rf"note r\.yaml:\d+:\d+: stages\.{key}[\w.]*: .*{text}", note) for note in notes), key
    assert re.search(r"^checked wit: .*train rows, eval rows, .*model$", done.stdout, re.MULTILINE)
    assert re.search(r"^checked bench\[wit\]: task colours, metrics, ", done.stdout, re.MULTILINE)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cache"]
    again = command(tmp_path, "--check")
    free = re.compile(r"[\d.]+ GiB (are )?free")  # other processes write to the disk, too
    assert free.sub("", again.stdout) == free.sub("", done.stdout.partition("\n")[2])
    shown = json.loads(command(tmp_path, "--check", "--json").stdout)
    assert [step["step"] for step in shown["steps"]] == ["wit", "long", "bench[wit]"]
    assert [f"note {note}" for note in shown["notes"]] == notes
    prepared = {path.name for path in (tmp_path / "runs" / "cache" / "prepared").iterdir()}
    run = command(tmp_path, "--stage", "wit")
    assert run.returncode == 0, run.stderr
    assert "checking" not in run.stdout
    assert "note r.yaml" in run.stdout
    assert {path.name for path in (tmp_path / "runs" / "cache" / "prepared").iterdir()} == prepared
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": "Sky? ", "answer": 0}) + "\n")
    changed = command(tmp_path, "--check")
    assert "checking 1 steps" in changed.stdout
    assert "slips: 2 steps to run, checked; nothing ran" in changed.stdout
    assert "only the recipe is checked; --check also checks" in command(tmp_path, "--plan").stdout


def test_models_that_do_not_fit_on_the_disk(tmp_path: Path, model_folder: Path) -> None:
    """200 layers of 4 matrices of 16384 x 16384 and 3 of 16384 x 65536 are 859 billion values: 3.2 TiB in float32."""
    write_world(tmp_path, model_folder)
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200, "num_attention_heads": 128}
    LlamaConfig(vocab_size=258, **sizes).save_pretrained(tmp_path / "model")
    stage = SFT.format(name="huge", model="./model", rows="./rows.jsonl", train="learning_rate: 1.0e-3")
    (tmp_path / "r.yaml").write_text(f"name: large\nstages:\n{stage}    random_init: true\n")
    done = command(tmp_path, "--check")
    assert done.returncode == 2
    assert re.search(r"^run-recipe: runs: the models need 32\d\d GiB, and [\d.]+ GiB are free", done.stderr)
