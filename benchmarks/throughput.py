"""Tokens per second of training on real instruction data, on a CPU: python -m benchmarks.throughput [--rounds N]

The same model (a Llama of SmolLM2-135M's width and vocabulary with 6 of its 30 layers, random weights, float32), the
same rows (see benchmarks.data, by the paper's text rule), the same optimiser, four layouts:

    official     as in the paper's scripts: one example at a time, gradients accumulated over 8; float32 logits and
                 log-probabilities of every position; the weighted sum divided by the count of non-zero weights
    trl          TRL's SFTTrainer: padded batches of 8
    trl packed   TRL's SFTTrainer with packing: one pack per optimiser step, about as many examples as the others
    ours         WITTrainer with the same packing

TRL has no weights: at (0, 1) it trains on completions only, else on all tokens equally. Gradient checkpointing is off.
Each way runs in its own process, the four in turn, for several rounds. Tokens are counted without padding; the clock
starts at the end of the first optimiser step. Figures are medians over the rounds.

A last run of `official` and of `ours` under torch's profiler shows which share of the time is in matrix products and
attention: what another loss or layout cannot take away is the part of `ours` that is in them.
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

WAYS = ("official", "trl", "trl packed", "ours")
WEIGHTS = ((0.0, 1.0), (0.2, 0.8))
EXAMPLES, PER_STEP, PACKED_LENGTH = 48, 8, 512
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = "scaled_dot_product"
TARGET = 2.0


def measure(way: str, prompt: float, completion: float, cache: Path, profiled: bool) -> dict[str, float]:
    """Measure in this process: tokens per second after the first step, tokens, steps, peak bytes and the last loss.

    With `profiled`, only the seconds and the share of them in matrix products and attention.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from stages.data.reader import Reading, read_examples

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.marks.append((time.perf_counter(), state.num_input_tokens_seen))

    torch.manual_seed(0)
    tokenizer = load_tokenizer(cache)
    tokenizer.pad_token = "<|endoftext|>"
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=len(tokenizer), tie_word_embeddings=True))
    rows = [row for _, row in read_examples(rows_file(cache), Reading("official"))]
    examples = rows[:: len(rows) // EXAMPLES][:EXAMPLES]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(way, model, tokenizer, examples, (prompt, completion), folder)
        if profiled:
            with torch.profiler.profile() as profile:
                trainer.train()
            seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
            products = sum(s for key, s in seconds.items() if key in PRODUCTS or ATTENTION in key)
            return {"seconds": sum(seconds.values()), "products": products}
        trainer.add_callback(clock)
        trainer.train()
    (start, tokens_before), (end, tokens) = clock.marks[0], clock.marks[-1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "rate": (tokens - tokens_before) / (end - start),
        "tokens": tokens,
        "steps": len(clock.marks),
        "peak": peak_bytes(),
        "loss": losses[-1],
    }


def _trainer(way: str, model: Any, tokenizer: Any, rows: list[Any], weights: tuple[float, float], folder: str) -> Any:
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from stages.sft.trainer import WITConfig, WITTrainer

    common = {"output_dir": folder, "num_train_epochs": 1, "learning_rate": 1e-4, "seed": 23, "logging_steps": 1}
    common |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    common |= {"include_num_input_tokens_seen": "non_padding", "save_strategy": "no", "disable_tqdm": True}
    texts = Dataset.from_list([row.columns() for row in rows])
    batch = {"per_device_train_batch_size": PER_STEP}
    packed = {"per_device_train_batch_size": 1, "packing": True}
    if way == "official":
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PER_STEP}
        args = TrainingArguments(**common, **batch, remove_unused_columns=False)
        return official_trainer(model, args, [_official_row(row, tokenizer, weights) for row in rows], tokenizer)
    common |= {"max_length": PACKED_LENGTH} | (batch if way == "trl" else packed)
    if way == "ours":
        wit = WITConfig(**common, prompt_loss_weight=weights[0], completion_loss_weight=weights[1])
        return WITTrainer(model, wit, texts, processing_class=tokenizer)
    sft = SFTConfig(**common, completion_only_loss=weights[0] == 0)
    return SFTTrainer(model, sft, train_dataset=texts, processing_class=tokenizer)


def official_trainer(model: Any, args: Any, rows: list[dict[str, list[Any]]], tokenizer: Any) -> Any:
    """Return a trainer in the layout of the paper's scripts; a row has `input_ids` and `weights`."""
    from datasets import Dataset

    data = Dataset.from_list(rows)
    return _official_class()(model, args, train_dataset=data, data_collator=_one_row, processing_class=tokenizer)


def _official_row(row: Any, tokenizer: Any, weights: tuple[float, float]) -> dict[str, list[Any]]:
    """Tokens and their weights; the completion starts after as many tokens as the prompt has alone."""
    ids = tokenizer(row.prompt + row.completion + tokenizer.eos_token).input_ids
    prompt = len(tokenizer(row.prompt).input_ids)
    return {"input_ids": ids, "weights": [weights[0]] * prompt + [weights[1]] * (len(ids) - prompt)}


def _one_row(rows: list[dict[str, list[Any]]]) -> dict[str, Any]:
    import torch

    (row,) = rows
    ids, weights = torch.tensor([row["input_ids"]]), torch.tensor([row["weights"]])
    weights[:, 0] = 0
    labels = ids.masked_fill(weights == 0, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "weights": weights}


def _official_class() -> type:
    import torch
    from transformers import Trainer

    class Official(Trainer):
        """- sum_t w_t log p(x_t | x_<t) / #{t : w_t != 0}, over the optimiser step, from all logits."""

        model_accepts_loss_kwargs = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            ids, mask, weights = inputs["input_ids"], inputs["attention_mask"], inputs["weights"]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
            log_probs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
            return -(log_probs * weights[:, 1:]).sum() / num_items_in_batch

    return Official


def main() -> int:
    """Run every way in its own process and print the table; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for downloads")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, prompt, completion = options.child
        print(json.dumps(measure(way, float(prompt), float(completion), options.cache, options.profiled)))
        return 0
    print(machine())
    print(f"{EXAMPLES} examples, {PER_STEP} to a step, packs of {PACKED_LENGTH} tokens; {options.rounds} rounds\n")
    missed = False
    for weights in WEIGHTS:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                runs[way].append(in_own_process("throughput", way, *weights, "--cache", options.cache))
        rate = {way: statistics.median(run["rate"] for run in results) for way, results in runs.items()}
        print(f"weights {weights}   tokens/s   of official's   peak GiB   tokens   steps   last loss")
        for way in WAYS:
            first, peak = runs[way][0], max(run["peak"] for run in runs[way])
            print(
                f"  {way:<16} {rate[way]:>8.0f} {rate[way] / rate['official']:>13.2f} x {peak / 2**30:>10.2f}"
                f" {first['tokens']:>8} {first['steps']:>7} {first['loss']:>11.4f}"
            )
        cache = ("--cache", options.cache, "--profiled")
        profiles = {way: in_own_process("throughput", way, *weights, *cache) for way in ("official", "ours")}
        for way, profile in profiles.items():
            share = profile["products"] / profile["seconds"]
            print(f"  {way}: {share:.0%} of the processor's time in matrix products and attention")
        floor = profiles["official"]["seconds"] / profiles["ours"]["products"]
        print(f"  without all else, ours would be {floor:.2f} x as fast as official")
        faster = rate["ours"] / rate["official"]
        missed |= faster < TARGET
        print(f"  target: {TARGET} x official's: {'reached' if faster >= TARGET else 'MISSED'}\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
