"""Only regular files are read: everything else is named at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from stages.system.integrity import require_regular
from tests.pipeline.run.test_command import environment

RECIPE = """\
name: r
model: ./model
stages:
  it: {kind: sft, data: {train: ./rows.jsonl}, weights: {prompt: 0, completion: 1}, train: {max_steps: 1}}
"""


def make(kind: str, path: Path) -> None:
    """Put something that is no regular file at `path`."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to({"a device": "/dev/zero", "made up by the kernel as it is read": "/proc/self/mountinfo"}[kind])


KINDS = ("a pipe", "a device", "a socket", "made up by the kernel as it is read")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(kind, tmp_path / "x")
    with pytest.raises(OSError, match=f"is {kind}, not a regular file"):
        require_regular(tmp_path / "x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["r.yaml", "rows.jsonl", "rows.jsonl/1.jsonl", "model/config.json", "model/x.json"])
def test_the_command_names_it_and_never_waits(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "model").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    if "/1" in place:
        (tmp_path / "rows.jsonl").mkdir()
    else:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / place).unlink(missing_ok=True)
    make(kind, tmp_path / place)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--plan"]
    done = subprocess.run(
        call, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"is {kind}" in done.stderr or f"{place}: a recipe is a file" in done.stderr
    assert Path(place).name in done.stderr


def test_a_large_file_that_was_never_written_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(b"x" * 2**20)
        sparse.truncate(10 * 2**40)
    with pytest.raises(OSError, match=r"only 0\.0 of its 10240\.0 GiB were ever written: an unfinished download\?"):
        require_regular(file)


def test_a_large_file_with_some_holes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as half:
        half.truncate(2**30)
        for position in range(0, 2**30, 2**20):
            half.seek(position)
            half.write(b"x" * 600_000)
    require_regular(file)


def test_planning_shows_how_far_a_large_model_is_read(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.system.integrity.PROGRESS_SECONDS", 0.0)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    shutil.copytree(model_folder, tmp_path / "model")
    with (tmp_path / "model/large.safetensors").open("wb") as file:
        for _ in range(26):
            file.write(bytes(4 * 2**20))
    assert main(["r.yaml", "--plan"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reading large.safetensors: ")]
    assert shown[-1] == "reading large.safetensors: 0.1 of 0.1 GiB"
