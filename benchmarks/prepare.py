"""Preparing rows for training, rows -> tokens and labels: python -m benchmarks.prepare [--rounds N]

Speed: examples per second of `_prepare_dataset` in SFTTrainer and WITTrainer (tokenise, label, truncate, drop rows
without labels) on the same 20,000 rows with SmolLM2's tokenizer, as messages and as text of prompt and completion. Each
trainer runs with its default number of processes (WITTrainer's: the number of cores) and with two. The rows are those
of benchmarks.data, repeated; a number at the end of each makes it unique, so no cache helps.

Memory: the peak of one process while an sft stage prepares 5,000 and 50,000 such rows from a JSONL file.

Each figure comes from its own process, those that are compared in turn; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data import CACHE, in_own_process, load_tokenizer, machine, peak_bytes, rows_file

WAYS = ("trl", "ours")
KINDS = {"messages": "alpaca", "text": "official"}
"""Kind of rows -> the `format` that produces it."""
ROWS, FEW_ROWS, MANY_ROWS, MAX_LENGTH = 20_000, 5_000, 50_000, 256
TARGET, MEMORY_TARGET = 4.0, 1.2


def write_rows(path: Path, count: int, cache: Path) -> None:
    """Write `count` distinct rows in alpaca's columns."""
    source_rows = [json.loads(line) for line in rows_file(cache).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = source_rows[number % len(source_rows)]
            file.write(json.dumps(row | {"output": f"{row['output']} {number}"}) + "\n")


def measure_speed(way: str, kind: str, processes: str, cache: Path) -> dict[str, float]:
    """Measure in this process: examples per second, prepared rows and tokens."""
    import datasets
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from stages.data.reader import Reading, read_examples
    from stages.sft.trainer import WITConfig, WITTrainer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(cache)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.jsonl"), ROWS, cache)
        rows = [row.columns() for _, row in read_examples(Path(folder, "rows.jsonl"), Reading(KINDS[kind]))]
        Dataset.from_list(rows).save_to_disk(f"{folder}/rows")
        data = Dataset.load_from_disk(f"{folder}/rows")
        trainer_class, config = (WITTrainer, WITConfig) if way == "ours" else (SFTTrainer, SFTConfig)
        args = config(
            output_dir=folder,
            max_length=MAX_LENGTH,
            dataset_num_proc=None if processes == "default" else int(processes),
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        few = Dataset.from_list(rows[:4])  # a warm-up
        trainer = trainer_class(model, args, train_dataset=few, processing_class=tokenizer)
        start = time.perf_counter()
        prepared = trainer._prepare_dataset(data, tokenizer, args, False, None, "train")
        seconds = time.perf_counter() - start
        return {"rate": ROWS / seconds, "rows": len(prepared), "tokens": sum(map(len, prepared["input_ids"]))}


def measure_memory(count: int, cache: Path) -> dict[str, float]:
    """Measure in this process: peak bytes before and after an sft stage prepares `count` rows, rows and seconds."""
    import datasets

    from stages.base import Context, Input
    from stages.data.dataset_cache import load_rows
    from stages.data.tokenization import Preparer
    from stages.sft.config import SFTStage

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(cache)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, count, cache)
        section = {
            "data": {"train": "./rows.jsonl"},
            "weights": {"prompt": 0, "completion": 1},
            "train": {"dataset_num_proc": 1},
        }
        context = Context(
            recipe="prepare",
            step="sft",
            config=SFTStage.model_validate(section),
            inputs={"train": Input(path, fingerprint=str(count))},
            out=Path(folder, "out"),
            scratch=Path(folder, "scratch"),
            checkpoints=Path(folder, "checkpoints"),
            cache=Path(folder, "cache"),
            progress=lambda *_: None,
        )
        before = peak_bytes()
        start = time.perf_counter()
        prepared, _ = load_rows(context, "train", Preparer(tokenizer, MAX_LENGTH))
        return {"before": before, "peak": peak_bytes(), "rows": len(prepared), "seconds": time.perf_counter() - start}


def compare_speed(rounds: int, cache: Path) -> bool:
    """Print the table of speeds; return whether every target is reached."""
    reached = True
    print(f"{ROWS} rows, {rounds} rounds          trl/s      ours/s     ratio   tokens of trl, of ours")
    for kind in KINDS:
        for processes in ("default", 2):
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    runs[way].append(in_own_process("prepare", way, kind, processes, "--cache", cache))
            trl, ours = (statistics.median(run["rate"] for run in runs[way]) for way in WAYS)
            reached &= ours >= TARGET * trl or processes != "default"
            tokens = ", ".join(str(runs[way][0]["tokens"]) for way in WAYS)
            print(f"  {kind:<9} processes: {processes:<8} {trl:>8.0f} {ours:>11.0f} {ours / trl:>7.1f} x   {tokens}")
    print(f"  target: {TARGET} x TRL's, each by default: {'reached' if reached else 'MISSED'}\n")
    return reached


def compare_memory(cache: Path) -> bool:
    """Print the table of memory; return whether the target is reached."""
    few, many = (in_own_process("prepare", "memory", count, 0, "--cache", cache) for count in (FEW_ROWS, MANY_ROWS))
    print("rows prepared   peak GiB   before (GiB)   seconds")
    for result in (few, many):
        peak, before = result["peak"] / 2**30, result["before"] / 2**30
        print(f"  {result['rows']:>11} {peak:>10.3f} {before:>14.3f} {result['seconds']:>9.1f}")
    reached = many["peak"] <= MEMORY_TARGET * few["peak"]
    print(
        f"  target: at most {MEMORY_TARGET} x the memory for ten times the rows: {'reached' if reached else 'MISSED'}"
    )
    return reached


def main() -> int:
    """Run every measurement in its own process and print the tables; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for downloads")
    parser.add_argument("--memory", action="store_true", help="measure only memory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, argument, processes = options.child
        if way == "memory":
            result = measure_memory(int(argument), options.cache)
        else:
            result = measure_speed(way, argument, processes, options.cache)
        print(json.dumps(result))
        return 0
    print(machine() + "\n")
    fast = options.memory or compare_speed(options.rounds, options.cache)
    small = compare_memory(options.cache)
    return int(not (fast and small))


if __name__ == "__main__":
    sys.exit(main())
