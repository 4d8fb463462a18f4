"""What a foreign text makes the program do ends."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stages.base import UserError
from stages.data.chat_rendering import TEMPLATE_SECONDS
from stages.inference.language_model import LanguageModel
from stages.system.limits import MEMORY, LimitExceeded, limited


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
    model = LanguageModel(model_folder, "m", "float32", trust_remote_code=False)
    model.tokenizer = tokenizer
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template of m rejects the prompt"):
        model.encode([{"role": "user", "content": "x"}])
    assert time.monotonic() - start < TEMPLATE_SECONDS + 20
