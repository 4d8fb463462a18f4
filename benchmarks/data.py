"""Rows, tokenizer and model of recipes/smollm2.yaml for the benchmarks on real text, and measuring helpers.

The files come from packages of a Python package index, with the hashes in the recipe, and are cached.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.store.references import fetch, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2.yaml"
CACHE = ROOT / "runs" / "cache"
"""The cache that a run of the recipe uses, too."""


def rows_file(cache: Path) -> Path:
    """Fetch 503 questions and answers in alpaca's columns, as JSONL."""
    reference = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"]["it"]["data"]["train"]
    return fetch(parse(reference, RECIPE.parent, "data"), cache)


def load_tokenizer(cache: Path) -> PreTrainedTokenizerBase:
    """Load SmolLM2's tokenizer with its chat template. The first call reads the model's file, in 0.5 GB of memory."""
    from transformers import AutoTokenizer

    saved = cache / "benchmark-tokenizer"
    if saved.exists():
        return AutoTokenizer.from_pretrained(saved)
    model = _model_file(cache)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


def smollm2(cache: Path) -> Path:
    """Convert the model of the recipe to a folder that from_pretrained loads."""
    from stages.models.gguf import to_safetensors

    return to_safetensors(_model_file(cache), cache)


def _model_file(cache: Path) -> Path:
    reference = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]
    return fetch(parse(reference, RECIPE.parent, "model"), cache)


def run_recipe(*arguments: str) -> list[str]:
    """Return the command line of `run-recipe ARGUMENTS`."""
    return [sys.executable, "-P", "-m", "pipeline.cli", *arguments]


def in_own_process(module: str, *arguments: object) -> dict[str, Any]:
    """Run `python -m benchmarks.module --child arguments` and return its last line, as JSON."""
    call = [sys.executable, "-m", f"benchmarks.{module}", "--child", *map(str, arguments)]
    process = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    if process.returncode:
        sys.exit(f"{' '.join(call)} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Return the peak memory of this process and of its finished children, whichever is larger."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * (1 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """Describe the machine."""
    return f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
