"""What a foreign text makes the program do ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.run.executor import checked_result
from stages.base import Findings, UserError
from stages.data.chat_rendering import TEMPLATE_SECONDS
from stages.inference.engine import Engine
from stages.models.model_size import build
from stages.models.tokenizer import load_tokenizer
from stages.system.limits import END_SIGNAL, END_TEXT, MEMORY, LimitExceeded, limited


def test_a_pattern_that_backtracks_for_ever_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(LimitExceeded, match="takes longer than 1 seconds"), limited(1):
        re.fullmatch("(a+)+b", "a" * 64)
    assert time.monotonic() - start < 5


def test_the_memory_of_a_block_is_limited_and_free_again() -> None:
    with pytest.raises(MemoryError), limited(60):
        bytearray(2 * MEMORY)
    assert len(bytearray(2**20)) == 2**20


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' * 1000 }}{% endfor %}{% endfor %}",
        "{{ ('x' * 999999999) * 999999999 }}",
    ],
)
def test_a_chat_template_neither_hangs_nor_fills_the_memory(model_folder: Path, tmp_path: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    model = Engine(tokenizer, AutoModelForCausalLM.from_pretrained(model_folder), "m")
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template of m rejects the prompt"):
        model.encode([{"role": "user", "content": "x"}])
    assert time.monotonic() - start < TEMPLATE_SECONDS + 20


HANGS_IN_C = """
from stages.system.limits import limited
a, b = [0.5] * 1000, [0.5] * 1000
for _ in range(4):
    a, b = [a] * 1000, [b] * 1000
with limited(1):
    print(a == b)
"""


def test_what_python_cannot_interrupt_ends_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS_IN_C], timeout=60, check=False)
    assert ended.returncode == -END_SIGNAL
    assert END_TEXT in str(checked_result(None, ended.returncode).error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_a_destructor_swallows_is_raised_again() -> None:
    """Python ignores what `__del__` raises, the limit's own exception among it."""
    ended_early: list[float] = []

    class Slow:
        def __del__(self) -> None:
            start = time.monotonic()
            try:
                time.sleep(5)
            finally:
                ended_early.append(time.monotonic() - start)

    def destroy_and_go_on() -> None:
        Slow()
        while True:
            pass

    start = time.monotonic()
    with pytest.raises(LimitExceeded), limited(1):
        destroy_and_go_on()
    assert ended_early[0] < 4, "the exception was raised there first"
    assert time.monotonic() - start < 4


def test_a_model_of_a_hundred_million_layers_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.models.model_size.BUILD_SECONDS", 5.0)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 100_000_000}))
    with pytest.raises(UserError, match="the model cannot be built from its config: takes longer than 5 seconds"):
        build(folder, "auto", False)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    ],
)
def test_a_tokenizer_that_panics_is_named(model_folder: Path, tmp_path: Path, normalizer: dict[str, object]) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    state = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    findings = Findings()
    with findings.part("tokenizer", "model"):
        load_tokenizer(folder)("some text")
    assert findings.problems or findings.passed
