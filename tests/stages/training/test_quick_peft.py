"""How training starts: without what only quantised models need, which they get when they do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.pipeline.run.test_command import environment

pytestmark = pytest.mark.long

CODE = """\
import sys, stages.{kind}.stage
print(sorted({{"bitsandbytes", "torch._inductor.compile_fx"}} & set(sys.modules)))
from peft.import_utils import is_bnb_4bit_available
from transformers.utils import is_bitsandbytes_available
import importlib.util
found = importlib.util.find_spec("bitsandbytes") is not None
print(is_bnb_4bit_available() == is_bitsandbytes_available() == found)
"""


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bitsandbytes_waits_until_it_is_used(kind: str) -> None:
    call = [sys.executable, "-P", "-c", CODE.format(kind=kind)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.splitlines()[-2:] == ["[]", "True"], done.stderr
