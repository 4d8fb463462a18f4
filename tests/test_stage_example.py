"""The stage in docs/stages.md works in a copy of the project."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
TEXTS = ["The sky is blue.", "Grün ist das Gras."]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A copy of the project with the stage, and a recipe that uses it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/stages.md").read_text(encoding="utf-8")
    config, stage = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    bits = folder / "stages/bits"
    bits.mkdir()
    (bits / "__init__.py").touch()
    (bits / "config.py").write_text(config, encoding="utf-8")
    (bits / "stage.py").write_text(stage, encoding="utf-8")
    index = folder / "stages/kinds.py"
    text = index.read_text().replace("KINDS:", "from stages.bits.config import BitsStage\n\nKINDS:", 1)
    index.write_text(text.replace("        SFTStage,\n", "        SFTStage,\n        BitsStage,\n", 1))
    shutil.copytree(model_folder, folder / "pocket/model")
    (folder / "r.yaml").write_text(recipe)
    write_texts(folder, TEXTS)
    return folder


def write_texts(folder: Path, texts: list[str]) -> None:
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")


def command(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(call, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_its_result_equals_that_of_plain_transformers(project: Path, model_folder: Path) -> None:
    process = command(project)
    assert process.returncode == 0, process.stdout + process.stderr
    model, tokenizer = (auto.from_pretrained(model_folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=ids).loss.item()  # over all tokens but the first
        expected.append(mean * (ids.shape[1] - 1) / math.log(2) / len(text.encode()))
    manifest = json.loads((project / "runs/bits/bits[base]/stage.json").read_text())
    (row,) = manifest["metrics"]["results"]
    assert row["value"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert "texts" in (project / "runs/bits/report/report.md").read_text()
    assert "2 steps, 2 cached" in command(project).stdout


def test_errors_name_their_place(project: Path) -> None:
    wrong = command(project, "--plan", "--set", "stages.bits.text=./texts.jsonl")
    assert wrong.returncode == 2
    assert "stages.bits.text: unknown key; did you mean 'texts'?" in wrong.stderr
    write_texts(project, ["x"])
    too_short = command(project)
    write_texts(project, TEXTS)
    assert too_short.returncode == 2
    place = r"r\.yaml:\d+:\d+: stages\.bits\.texts: .*texts\.jsonl:1: "
    assert re.search(place + "'text' must have two characters", too_short.stderr)
