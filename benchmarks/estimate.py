"""Memory that `--estimate` predicts against measured peaks: python -m benchmarks.estimate [CASE]...

Builds Llamas with random weights, runs one stage of each with run-recipe, a training for two steps, and compares the
largest process with the estimate. Exits with 1 if an estimate is more than 25 % off.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data import machine
from stages.system.memory import BYTES

MOST = 0.25
"""Largest relative error of an estimate."""
SIZES = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 1024},
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 16384},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}
"""Name -> fields of a LlamaConfig; the last has the shape of SmolLM2-135M."""
LORA = {"lora": {"r": 16, "target_modules": "all-linear"}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full 1M": ("1M", "sft", {}),
    "full 30M": ("30M", "sft", {}),
    "full 135M": ("135M", "sft", {}),
    "lora 135M": ("135M", "sft", LORA),
    "qlora 135M": ("135M", "sft", LORA | {"quantization": {"load_in_4bit": True}}),
    "checkpointed 30M": ("30M", "sft", {"train": {"gradient_checkpointing": True}}),
    "dpo 30M": ("30M", "dpo", {}),
    "lm_eval 30M": ("30M", "lm_eval", {}),
    "lm_eval 135M": ("135M", "lm_eval", {}),
}
"""Name -> model size, kind of stage, further keys of its section."""
TASK = """\
task: ends
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: "{{[completion, completion[1:]]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
ROWS, LENGTH, BATCH, STEPS = 16, 160, 4, 2
LARGEST = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""Prints the peak of the largest process that a command starts. A small process starts it, because Linux counts the
memory of the parent at the fork as the child's."""


def make_world(folder: Path, size: str, kind: str, more: dict[str, Any]) -> None:
    """Write a model, rows of LENGTH tokens and the recipe r.yaml into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**SIZES[size], num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answer = "x" * (LENGTH - 33)  # 32 bytes of prompt, and the EOS token
    answers = {"completion": answer} if kind != "dpo" else {"chosen": answer, "rejected": "y" * len(answer)}
    lines = [json.dumps({"prompt": f"Row {number:028d}", **answers}) + "\n" for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(lines))
    train = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_checkpointing": False}
    train |= more.get("train", {})
    stage: dict[str, Any] = {"kind": kind, **more}
    if kind == "lm_eval":
        (folder / "tasks").mkdir()
        (folder / "tasks" / "ends.yaml").write_text(TASK)
        ends = {"task": "ends", "metric": "acc", "data": {"test": "./rows.jsonl"}}
        options = {"dtype": "float32"}
        stage |= {"models": ["base"], "include_path": "./tasks", "tasks": [ends], "options": options}
    else:
        stage |= {"data": {"train": "./rows.jsonl"}, "train": train}
    if kind == "sft":
        stage["weights"] = {"prompt": 0.2, "completion": 0.8}
    (folder / "r.yaml").write_text(json.dumps({"name": "r", "model": "./model", "stages": {"measured": stage}}))


def estimated(folder: Path) -> dict[str, Any]:
    """Return the entry of the one stage in `--estimate --json`."""
    call = [sys.executable, "-m", "pipeline.cli", str(folder / "r.yaml"), "--runs", str(folder / "runs")]
    done = subprocess.run([*call, "--estimate", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)["steps"][0]


def peak(folder: Path) -> int:
    """Run the recipe and return the peak of its largest process, in bytes."""
    call = [sys.executable, "-m", "pipeline.cli", str(folder / "r.yaml"), "--runs", str(folder / "runs"), "--jobs", "1"]
    with (folder / "log.txt").open("w") as log:
        measured = subprocess.run(
            [sys.executable, "-c", LARGEST, *call], stdout=subprocess.PIPE, stderr=log, check=False
        )
    if measured.returncode:
        sys.exit((folder / "log.txt").read_text())
    return int(measured.stdout) * BYTES


def main(names: list[str]) -> int:
    """Measure and print; return 1 if an estimate is too far off."""
    print(machine())
    print(f"{'case':<16} {'parameters':>12} {'estimate':>10} {'measured':>10} {'estimate / measured':>20}", flush=True)
    missed = False
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_world(folder, *CASES[name])
            estimate, measured = estimated(folder), peak(folder)
        ratio = estimate["memory_total"] / measured
        missed |= abs(ratio - 1) > MOST
        figures = f"{estimate['memory_total'] / 2**30:>7.2f} GiB {measured / 2**30:>7.2f} GiB {ratio:>20.2f}"
        print(f"{name:<16} {estimate['parameters']:>12,} {figures}", flush=True)
        print("  " + ", ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in estimate["memory"].items() if size))
    print("aim: within 25 %:", "MISSED" if missed else "reached")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
