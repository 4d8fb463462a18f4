"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny import byte_tokenizer, tiny_model

settings.register_profile("ci", derandomize=True)  # the gate tries the same rows each time
if os.environ.get("CI"):
    settings.load_profile("ci")

torch.set_num_threads(1)  # for models this small; on cores that tests share, threads mostly wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start; the command gives its workers their own number
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that from_pretrained loads: the tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones go first, so that processes which share the tests end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
