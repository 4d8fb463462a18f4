"""Tokens per second, MFU and memory of training a 1B model on one GPU: python -m benchmarks.gpu [--tests] [--out FILE]

The model has the shape of Llama-3.2-1B (1.24 B weights, random) and trains on random rows of about 150 tokens, half of
each a prompt, with AdamW and bfloat16 autocast. A step has 8,192 tokens in 4 packs of 2,048, or 56 rows. Tokens are
counted without padding. The clock starts after the first steps, whose time, compiling included, is a column of its own.
A way whose package is not installed, or for which `--seconds` is too short, gets a row that says so.

The second table times the loss head alone, forward and backward, on 8,192 positions of which all or half have a label.

`--tests` runs the tests of tests/gpu first. The tables go to docs/benchmarks.md, or with `--out` to a file that
`--write FILE` copies there later.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
TOKENIZER = PAGE.parents[1] / "recipes" / "pocket" / "model"
START, END = "<!-- python -m benchmarks.gpu -->", "<!-- end -->"
SHAPE: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
ROWS, PACK, PACKS, MICRO_BATCHES, PADDED = 4000, 2048, 4, 7, 8
WARM_UP, MEASURED_SECONDS, MAX_STEPS = 3, 8.0, 40
TARGET = 45_000
PACKED = {"per_device_train_batch_size": PACKS, "packing": True}
PADDED_ROWS = {"per_device_train_batch_size": PADDED, "gradient_accumulation_steps": MICRO_BATCHES}


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    trainer: str
    """`official`, `trl` or `wit`."""
    fields: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: str = "float32"
    package: str = ""


WAYS = [
    Way("WITTrainer packed", "wit", PACKED),
    Way("WITTrainer packed, bf16 weights", "wit", PACKED, dtype="bfloat16"),
    Way("WITTrainer packed, flash_attention_2", "wit", PACKED, "flash_attention_2", package="flash_attn"),
    Way("WITTrainer packed, Liger layers", "wit", PACKED | {"use_liger_kernel": True}, package="liger_kernel"),
    Way("WITTrainer packed, torch_compile", "wit", PACKED | {"torch_compile": True}),
    Way("WITTrainer packed, torch_compile, bf16 weights", "wit", PACKED | {"torch_compile": True}, dtype="bfloat16"),
    Way(
        "WITTrainer packed, torch_compile, flash_attention_2",
        "wit",
        PACKED | {"torch_compile": True},
        "flash_attention_2",
        package="flash_attn",
    ),
    Way("TRL packed", "trl", PACKED),
    Way("TRL padded", "trl", PADDED_ROWS),
    Way("WITTrainer padded", "wit", PADDED_ROWS),
    Way("WITTrainer packed, flex_attention", "wit", PACKED, "flex_attention"),
    Way("official layout", "official", {"gradient_accumulation_steps": PADDED * MICRO_BATCHES}),
]


def rows(count: int = ROWS) -> list[dict[str, list[Any]]]:
    """Return random rows: 20 to 600 tokens, 150 on average, half of them prompt."""
    source = random.Random(0)
    lengths = [min(max(round(source.gammavariate(2, 75)), 20), 600) for _ in range(count)]
    return [
        {
            "input_ids": [source.randrange(1000, SHAPE["vocab_size"]) for _ in range(length)],
            "loss_weights": [0.2] * (length // 2) + [0.8] * (length - length // 2),
        }
        for length in lengths
    ]


def train(way: Way, data: list[dict[str, list[Any]]], device: str) -> dict[str, float]:
    """Train in this process; return tokens per second, MFU, seconds of the first steps and peak bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

    from stages.sft.mfu import model_flops, peak_flops

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                synchronize()
                self.start, self.warm_up = time.perf_counter(), time.perf_counter() - self.begin
            elif state.global_step > WARM_UP and time.perf_counter() - self.start > MEASURED_SECONDS:
                control.should_training_stop = True

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**SHAPE), attn_implementation=way.attention, dtype=getattr(torch, way.dtype)
        )
    flops = model_flops(model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(way, model, AutoTokenizer.from_pretrained(TOKENIZER), data, folder, device)
        trainer.add_callback(clock)
        collate, tokens = trainer.data_collator, []

        def count(batch: Any) -> Any:
            result = collate(batch)
            mask = result.get("attention_mask", result["input_ids"])
            tokens.append(mask.numel() if mask is result["input_ids"] else int(mask.sum()))
            return result

        trainer.data_collator = count
        trainer.train()
        synchronize()
    steps = trainer.state.global_step - WARM_UP
    per_step = sum(tokens) / len(tokens) * trainer.args.gradient_accumulation_steps
    speed = steps * per_step / (time.perf_counter() - clock.start)
    lengths = [len(row["input_ids"]) for row in data]
    pairs = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    peak = peak_flops(torch.device(device))
    assert flops is not None
    return {
        "speed": speed,
        "mfu": speed * (flops[0] + flops[1] * pairs) / peak if peak else 0.0,
        "start": clock.warm_up,
        "memory": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
    }


def _trainer(way: Way, model: Any, tokenizer: Any, data: list[Any], folder: str, device: str) -> Any:
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from benchmarks.throughput import official_trainer
    from stages.sft.trainer import WITConfig, WITTrainer

    gpu = device == "cuda"
    common: dict[str, Any] = {"output_dir": folder, "max_steps": MAX_STEPS, "learning_rate": 1e-5, "logging_steps": 10}
    common |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": gpu, "use_cpu": not gpu}
    common |= {"dataloader_pin_memory": gpu} | way.fields
    if way.trainer == "official":
        args = TrainingArguments(**common, per_device_train_batch_size=1, remove_unused_columns=False)
        renamed = [{"input_ids": row["input_ids"], "weights": row["loss_weights"]} for row in data]
        return official_trainer(model, args, renamed, tokenizer)
    common |= {"max_length": PACK, "activation_checkpointing": False}
    if way.trainer == "wit":
        common |= {"accelerator_config": {"non_blocking": gpu}}  # as stages.training.loop sets it
        wit = WITConfig(**common, prompt_loss_weight=1.0)
        return WITTrainer(model, wit, Dataset.from_list(data), processing_class=tokenizer)
    plain = Dataset.from_list([{"input_ids": row["input_ids"]} for row in data])
    return SFTTrainer(model, SFTConfig(**common), train_dataset=plain, processing_class=tokenizer)


def heads() -> Iterator[tuple[str, str, Callable[[Any, Any, Any, Any], Any]]]:
    """Yield name, package and the summed loss of each head: (model, hidden, labels, weights) -> scalar.

    `labels` belong to the position before them and are -100 where there is none.
    """
    import torch

    def full(model: Any, hidden: Any, labels: Any, weights: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight).float()
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        return (nll * weights).sum()

    def fused(model: Any, hidden: Any, labels: Any, weights: Any) -> Any:
        output = model(inputs_embeds=hidden[None], shift_labels=labels[None], fused_lm_head=True, use_cache=False)
        return -(output.log_probs[0] * weights).sum()

    def cut(model: Any, hidden: Any, labels: Any, weights: Any) -> Any:
        from cut_cross_entropy import linear_cross_entropy

        return (linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="none") * weights).sum()

    def liger(model: Any, hidden: Any, labels: Any, weights: Any) -> Any:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(model.lm_head.weight, hidden, labels)

    yield "full float32 logits", "", full
    yield "TRL fused, which WITTrainer uses", "", fused
    yield "cut-cross-entropy", "cut_cross_entropy", cut
    yield "Liger, without weights", "liger_kernel", liger


def time_head(head: Callable[[Any, Any, Any, Any], Any], share: float, device: str) -> tuple[float, int]:
    """Return milliseconds of one forward and backward pass, and the peak bytes beyond the head's inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    with torch.device(device):  # no layers: the model's last norm is all that is before its head
        config = LlamaConfig(**SHAPE | {"num_hidden_layers": 0})
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        hidden = torch.randn(PACK * PACKS, SHAPE["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(SHAPE["vocab_size"], (PACK * PACKS,))
        labels[torch.arange(len(labels)) % 100 >= 100 * share] = -100
        weights = torch.rand(len(labels))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(12 if device == "cuda" else 1):
        start = time.perf_counter()
        head(model, hidden, labels, weights).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad()
        hidden.grad = None
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return 1000 * sorted(times)[len(times) // 2], peak


def free() -> None:
    """Free the memory of the last way, so that the next one measures its own."""
    import torch

    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def lines(device: str, seconds: float) -> Iterator[str]:
    """Measure; yield the lines of the tables."""
    import torch
    import transformers
    import trl

    end = time.monotonic() + seconds
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    yield f"{name}, {versions}, {time.strftime('%Y-%m-%d', time.gmtime())}:\n"
    yield "| way | tokens/s | MFU | first steps, s | memory, GiB |\n|---|---:|---:|---:|---:|"
    data, fastest = rows(), 0.0
    for way in WAYS:
        if problem := _missing(way.package, end):
            yield f"| {way.name} | {problem} | | | |"
            continue
        try:
            result = train(way, data, device)
        except Exception as error:  # out of memory, a kernel that does not work here: a row, and the others still run
            yield f"| {way.name} | {type(error).__name__}: {_first_line(error)} | | | |"
        else:
            fastest = max(fastest, result["speed"] if way.trainer == "wit" else 0)
            mfu, memory = f"{result['mfu']:.3f}", f"{result['memory'] / 2**30:.1f}"
            yield f"| {way.name} | {result['speed']:,.0f} | {mfu} | {result['start']:.0f} | {memory} |"
        free()
    verdict = "reached" if fastest >= TARGET else "MISSED"
    yield f"\nTarget: {TARGET:,} tokens/s by WITTrainer: {verdict}, {fastest:,.0f}.\n"
    yield "| head alone, 8,192 positions | all labels, ms | GiB | half, ms | GiB |\n|---|---:|---:|---:|---:|"
    for title, package, head in heads():
        if problem := _missing(package, end):
            yield f"| {title} | {problem} | | | |"
            continue
        try:
            cells = [f"{ms:.1f} | {peak / 2**30:.1f}" for ms, peak in (time_head(head, s, device) for s in (1.0, 0.5))]
        except Exception as error:
            cells = [f"{type(error).__name__}: {_first_line(error)} | ", " | "]
        yield f"| {title} | {' | '.join(cells)} |"
        free()


def _missing(package: str, end: float) -> str:
    """Return why a way is not measured; an empty text if it is."""
    if package and find_spec(package) is None:
        return f"not measured: {package.replace('_', '-')} is not installed"
    return "" if time.monotonic() < end else "not measured: no time left"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].replace("|", "/")[:100]


def write_page(text: str) -> None:
    """Replace the tables in docs/benchmarks.md."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(page), f"{PAGE} has no place for the tables"
    PAGE.write_text(pattern.sub(lambda _: f"{START}\n\n{text.strip()}\n\n{END}", page), encoding="utf-8")


def run_tests() -> int:
    """Run tests/gpu; return pytest's exit code."""
    call = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-rs", "-p", "no:cacheprovider"]
    paths = [str(PAGE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(call, cwd=PAGE.parents[1], env=environment, check=False).returncode


def main() -> int:
    """Run the tests if asked to, measure and write the tables; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="run tests/gpu first")
    parser.add_argument("--seconds", type=float, default=330, help="stop starting ways after so many seconds")
    parser.add_argument("--out", type=Path, help="write the tables to this file instead of docs/benchmarks.md")
    parser.add_argument("--write", type=Path, metavar="FILE", help="copy the tables of an earlier --out, and stop")
    options = parser.parse_args()
    if options.write:
        write_page(options.write.read_text(encoding="utf-8"))
        return 0
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: needs a CUDA GPU, and there is none here")
    failed = run_tests() if options.tests else 0
    text = ""
    for line in lines("cuda", options.seconds):
        print(line, flush=True)
        text += line + "\n"
        if options.out:
            options.out.write_text(text, encoding="utf-8")
    if not options.out:
        write_page(text)
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
