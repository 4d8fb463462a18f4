"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import byte_tokenizer, tiny_model

settings.register_profile("ci", derandomize=True)  # the gate tries the same rows each time
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that from_pretrained loads: the tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
