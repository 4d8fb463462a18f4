"""The prompt sensitivity index beside the authors' package: python -m benchmarks.posix [--model FOLDER] [--sets 12]

Both measure the same sets of prompts with the same model, float32, greedy, in batches of 64, of which the package
fills no more than one set: prompt-sensitivity-index 0.0.1 prompt by prompt, as it does by default, and in batches, and
the stage's own function in the package's convention. In turn, several rounds. Prints seconds (medians), how much faster
than the package by default and than its faster way, and the largest difference of an index from the package's, prompt
by prompt.

A set is a question of the pocket world in its four held-out wordings, each once more with spelling errors. Open:
answers of 20 tokens. Multiple choice: four choices below the question, answers of 5 tokens, as many as the package
gives by default. Unless a model is named, two serve: the pocket world's, and SmolLM2-135M out of a package of a Python
package index (98 MB, converted once).
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

from benchmarks.data import CACHE, machine, smollm2
from stages.inference.language_model import LanguageModel
from stages.sensitivity.config import Options, Prompts
from stages.sensitivity.sets import misspelt
from stages.sensitivity.stage import measure

ROOT = Path(__file__).resolve().parent.parent
WORDINGS = ROOT / "recipes" / "pocket" / "data" / "wordings.test.jsonl"
CHOICES = ROOT / "recipes" / "pocket" / "data" / "knowledge.test.jsonl"
BATCH = 64
AIM = 5.0
KINDS = {"open": 20, "multiple choice": 5}
"""What is asked, and the tokens of an answer."""


def sets_of(count: int, kind: str) -> list[list[str]]:
    """So many sets of up to eight prompts, their questions spread over the families."""
    rows = [json.loads(line) for line in WORDINGS.open(encoding="utf-8")]
    items = [json.loads(line) for line in CHOICES.open(encoding="utf-8")]
    if kind == "multiple choice":
        rows = [row for row in rows if row["family"] in {item["family"] for item in items}]
    sets = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        words = [*row["prompts"], *(misspelt(prompt, str(i)) for i, prompt in enumerate(row["prompts"]))]
        listed = ""
        if kind == "multiple choice":
            choices = next(item["choices"] for item in items if item["family"] == row["family"])
            listed = "".join(f"\n{letter}.{choice}" for letter, choice in zip("ABCD", choices, strict=True))
        sets.append(list(dict.fromkeys(f"Q: {prompt}{listed}\nA:" for prompt in words)))
    return sets


def compare(name: str, model: Path, kind: str, count: int, rounds: int) -> None:
    """Print what each way takes, and how far their results are apart."""
    sets, tokens = sets_of(count, kind), KINDS[kind]
    theirs = _quietly(lambda: HFModel(str(model), dtype=torch.float32))
    ours = _quietly(lambda: LanguageModel(model, name, "float32", False))
    prompts = Prompts(name="bench", data="", max_new_tokens=tokens)
    options = Options(batch_size=BATCH, convention="package")

    def package(batched: bool) -> list[float]:
        config = PosixConfig(max_new_tokens=tokens, batched=batched, batch_size=BATCH)
        return _quietly(lambda: get_prompt_sensitivity(theirs, sets, config)[1].prompt_sensitivities)

    def stage() -> list[float]:
        encoded = [[ours.encode(prompt) for prompt in each] for each in sets]
        return [index for *_, index in measure(ours, options, prompts, encoded)]

    ways: dict[str, Callable[[], list[float]]] = {
        "the package, prompt by prompt": lambda: package(False),
        "the package, batched": lambda: package(True),
        "the sensitivity stage": stage,
    }
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            began = time.perf_counter()
            found[way] = run()
            seconds[way].append(time.perf_counter() - began)
    alone, batched, mine = (statistics.median(seconds[way]) for way in ways)
    indices = list(found.values())
    apart = max(abs(a - b) for a, b in zip(indices[0], indices[2], strict=True))
    print(f"{name}, {kind}: {len(sets)} sets, {sum(map(len, sets))} prompts, answers of {tokens} tokens")
    for way, each in zip(ways, (alone, batched, mine), strict=True):
        print(f"  {way:31} {each:8.2f} s")
    print(f"  faster than the package by default: {alone / mine:.1f} x (aim {AIM:g} x)")
    print(f"  faster than the package's faster way: {min(alone, batched) / mine:.1f} x")
    print(f"  largest difference of an index from the package's: {apart:.1e} (aim 1e-4)", flush=True)


def _quietly(call: Callable[[], Any]) -> Any:
    """What `call` returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


def main() -> None:
    """Read the command line, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder that from_pretrained loads, in place of the two")
    parser.add_argument("--sets", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where what is fetched is kept")
    given = parser.parse_args()
    print(machine())
    if given.model:
        models = {given.model.name: given.model}
    else:
        models = {"pocket": ROOT / "recipes" / "pocket" / "model", "SmolLM2-135M": smollm2(given.cache)}
    for name, model in models.items():
        for kind in KINDS:
            compare(name, model, kind, given.sets, given.rounds)


if __name__ == "__main__":
    main()
