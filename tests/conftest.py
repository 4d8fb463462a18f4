"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that from_pretrained loads: the tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
