"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny import byte_tokenizer, tiny_model

settings.register_profile("ci", derandomize=True)  # CI tries the same examples each time
if os.environ.get("CI"):
    settings.load_profile("ci")

torch.set_num_threads(1)  # small models gain nothing from threads, which slow down parallel tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes; the command sets another number for its workers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep instead of spinning


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the tiny model with its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long tests first, so that parallel processes finish at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
