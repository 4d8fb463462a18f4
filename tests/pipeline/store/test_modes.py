"""Published files can be read by whom the umask allows, whatever modes the libraries gave them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.store.store import Store
from stages.records.manifest import Manifest
from stages.records.metrics import Metrics


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("is_recovered", [False, True])
def test_published_files_have_the_modes_of_the_umask(tmp_path: Path, umask: int, is_recovered: bool) -> None:
    store = Store(tmp_path / "store")
    out = store.unfinished("f") / "out"
    out.mkdir(parents=True)
    out.chmod(0o2777 & ~umask)  # as in a folder that a group shares
    save_file({"w": torch.zeros(2)}, out / "model.safetensors")  # through a temporary file of mode 0600
    private = Path(tempfile.mkdtemp(dir=out))  # 0700
    os.close(os.open(private / "scores.csv", os.O_CREAT | os.O_WRONLY, 0o600))
    manifest = Manifest(
        step="s", kind="sft", version=1, fingerprint="f", config={}, inputs={}, metrics=Metrics(), environment={},
        started="", seconds=1.0, outputs={},
    )  # fmt: skip
    path = store.publish(out, manifest).path
    if is_recovered:  # a run that was killed before it moved the folder
        path.chmod(0o700)
        (path / "model.safetensors").chmod(0o600)
        store.unfinished("f").mkdir()
        path.rename(out)
        recovered = store.recover("f")
        assert recovered is not None
        path = recovered.path
    files = [entry for entry in path.rglob("*") if entry.is_file()]
    assert {entry.name for entry in files} == {"model.safetensors", "scores.csv", "stage.json"}
    assert {entry.stat().st_mode & 0o777 for entry in files} == {0o666 & ~umask}
    assert {entry.stat().st_mode & 0o777 for entry in (path, path / private.name)} == {0o777 & ~umask}
    assert is_recovered or path.stat().st_mode & 0o2000
