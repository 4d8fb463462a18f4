"""Copies of a runs folder, and names of files that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pipeline.run.test_command import RECIPE, command, states, write_world

pytestmark = pytest.mark.long

REPORT_ONLY = RECIPE[: RECIPE.index("  wit:")] + RECIPE[RECIPE.index("  bench:") :].replace(
    "[base, it, wit, dpo]", "[base]"
)
"""`it`, its benchmark and the report."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("copies") / "world"
    folder.mkdir()
    write_world(folder, model_folder)
    (folder / "r.yaml").write_text(REPORT_ONLY)
    odd = os.fsencode(folder) + b"/tasks/caf\xe9.yaml"
    with open(odd, "w") as file:  # noqa: PTH123  # of bytes
        file.write((folder / "tasks/colours.yaml").read_text().replace("colours", "colours_2"))
    (folder / "many").mkdir()
    shutil.move(folder / "rows.jsonl", os.fsencode(folder) + b"/many/rows-\xff.jsonl")
    (folder / "r.yaml").write_text(REPORT_ONLY.replace("./rows.jsonl", "./many"))
    done = command(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_names_that_are_not_utf_8(world: Path) -> None:
    assert set(states(world).values()) == {"done"}
    assert command(world).returncode == 0
    assert set(states(world).values()) == {"cached"}


@pytest.mark.parametrize("options", ["-a", "-rL"])
def test_a_copied_runs_folder_works(world: Path, tmp_path: Path, options: str) -> None:
    """`cp -rL` replaces the links to results by copies of them."""
    copy = tmp_path / "copy"
    shutil.copytree(world, copy, symlinks=True, ignore=lambda *_: ["runs"])
    subprocess.run(["cp", options, str(world / "runs"), str(copy / "runs")], check=True)
    done = command(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(states(copy).values()) == {"cached"}
    assert json.loads((copy / "runs/small/it/stage.json").read_text())["step"] == "it"


def test_a_copy_that_is_no_longer_the_result_is_refused(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world, copy, symlinks=True)
    link = copy / "runs/small/it"
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, link)
    done = command(copy, "--set", "stages.it.train.max_steps=4")
    assert done.returncode == 1
    assert "runs/small/it is a folder where a link to a result belongs" in done.stderr
    assert "Traceback" not in done.stderr
    assert (link / "stage.json").exists()
