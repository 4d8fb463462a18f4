"""Compare the speed and the scores of the sensitivity stage with those of the authors' package.

    python -m benchmarks.posix [--model FOLDER] [--sets 12]

Measures the same sets of prompts with the same model in float32, greedily, in batches of 64: by
prompt-sensitivity-index 0.0.1 prompt by prompt (its default) and batched (its batches hold one set at most), and by the
stage's own function with the package's formula. The three run in turn for several rounds. Prints median seconds, the
speed-up over both ways of the package, and the largest difference of an index from the package's default.

A set is a question of the pocket world in its four held-out wordings, each also with spelling errors. Open questions
are answered with 20 tokens, multiple-choice questions (four choices) with 5, the package's default. The default models
are the pocket model and SmolLM2-135M from a Python package index (98 MB, converted once).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prompt_sensitivity_index.models import HFModel
from prompt_sensitivity_index.posix import PosixConfig, get_prompt_sensitivity

from benchmarks.data import CACHE, ROOT, machine, smollm2
from stages.inference.loading import load_engine
from stages.sensitivity.config import Options, SensitivityStage
from stages.sensitivity.sets import Prompts, misspelt
from stages.sensitivity.stage import measure

WORDINGS = ROOT / "recipes" / "pocket" / "data" / "wordings.test.jsonl"
CHOICES = ROOT / "recipes" / "pocket" / "data" / "knowledge.test.jsonl"
BATCH = 64
TARGET = 5.0
ANSWER_TOKENS = {"open": 20, "multiple choice": 5}


def read_sets(count: int, kind: str) -> list[list[str]]:
    """Read `count` sets of up to eight prompts, spread over the families of questions."""
    rows = [json.loads(line) for line in WORDINGS.open(encoding="utf-8")]
    items = [json.loads(line) for line in CHOICES.open(encoding="utf-8")]
    if kind == "multiple choice":
        rows = [row for row in rows if row["family"] in {item["family"] for item in items}]
    sets = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        wordings = [*row["prompts"], *(misspelt(prompt, str(i)) for i, prompt in enumerate(row["prompts"]))]
        lines = ""
        if kind == "multiple choice":
            choices = next(item["choices"] for item in items if item["family"] == row["family"])
            lines = "".join(f"\n{letter}.{choice}" for letter, choice in zip("ABCD", choices, strict=True))
        sets.append(list(dict.fromkeys(f"Q: {wording}{lines}\nA:" for wording in wordings)))
    return sets


def compare(name: str, path: Path, kind: str, count: int, rounds: int) -> None:
    """Print the seconds of each method, and the difference between their indices."""
    sets, tokens = read_sets(count, kind), ANSWER_TOKENS[kind]
    package_model = _quietly(lambda: HFModel(str(path), dtype=torch.float32))
    entry = Prompts(name="bench", data="", max_new_tokens=tokens)
    options = Options(convention="package", dtype="float32")
    stage_config = SensitivityStage(models=[name], prompts=[entry], options=options)
    stage_model = _quietly(lambda: load_engine(stage_config, path))

    def package(batched: bool) -> list[float]:
        config = PosixConfig(max_new_tokens=tokens, batched=batched, batch_size=BATCH)
        return _quietly(lambda: get_prompt_sensitivity(package_model, sets, config)[1].prompt_sensitivities)

    def stage() -> list[float]:
        encoded = [[stage_model.encode(prompt) for prompt in prompts] for prompts in sets]
        return [measurement.psi for measurement in measure(stage_model, options, entry, encoded)]

    methods: dict[str, Callable[[], list[float]]] = {
        "the package, prompt by prompt": lambda: package(False),
        "the package, batched": lambda: package(True),
        "the sensitivity stage": stage,
    }
    indices: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, run in methods.items():
            start_time = time.perf_counter()
            indices[method] = run()
            seconds[method].append(time.perf_counter() - start_time)
    medians = [statistics.median(seconds[method]) for method in methods]
    default, batched, ours = medians
    expected, _, measured = indices.values()
    difference = max(abs(a - b) for a, b in zip(expected, measured, strict=True))
    print(f"{name}, {kind}: {len(sets)} sets, {sum(map(len, sets))} prompts, answers of {tokens} tokens")
    for method, median in zip(methods, medians, strict=True):
        print(f"  {method:31} {median:8.2f} s")
    print(f"  faster than the package by default: {default / ours:.1f} x (aim {TARGET:g} x)")
    print(f"  faster than the package's faster way: {min(default, batched) / ours:.1f} x")
    print(f"  largest difference of an index from the package's: {difference:.1e} (aim 1e-4)", flush=True)


def _quietly(call: Callable[[], Any]) -> Any:
    """Call without console output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder that from_pretrained loads, in place of both models")
    parser.add_argument("--sets", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for downloads")
    options = parser.parse_args()
    print(machine())
    if options.model:
        models = {options.model.name: options.model}
    else:
        models = {"pocket": ROOT / "recipes" / "pocket" / "model", "SmolLM2-135M": smollm2(options.cache)}
    for name, path in models.items():
        for kind in ANSWER_TOKENS:
            compare(name, path, kind, options.sets, options.rounds)


if __name__ == "__main__":
    main()
