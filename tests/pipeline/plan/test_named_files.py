"""Files that an lm-eval task names outside of include_path are inputs of the step: shown, and in its fingerprint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.plan.cache import decide
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.recipe.loader import load
from pipeline.store.store import Store

RECIPE = """\
name: small
model: ./model
stages:
  bench: {kind: lm_eval, models: [base], include_path: ./tasks, tasks: [{task: mine}]}
"""
TASK = """\
task: mine
include: ../shared/common.yaml
dataset_path: json
dataset_kwargs:
  data_files: {test: items/*.jsonl}
process_docs: !function rules.chosen
doc_to_text: !function deeper.prompt.text
"""
FILES = {
    "tasks/mine.yaml": TASK,
    "shared/common.yaml": "include: deeper/basis.yml\ntest_split: test\n",
    "shared/deeper/basis.yml": "dataset_kwargs: {data_files: {dev: [one.csv, two.csv]}}\n",
    "one.csv": "a\n1\n",
    "two.csv": "a\n2\n",
    "items/1.jsonl": "{}\n",
    "items/2.jsonl": "{}\n",
    "tasks/rules.py": "WORDS = open('words/list.txt').read()\nfrom pathlib import Path\n"
    "MORE = Path(__file__).parent / '../words/more.txt'\n",
    "tasks/deeper/prompt.py": "def text(doc): return ''\n",
    "words/list.txt": "a\n",
    "words/more.txt": "b\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint() -> str:
    resolver = Resolver(Path("runs"), print)
    (decision,) = decide(build_plan(load(Path("r.yaml"), ()), resolver), Store(Path("store")), resolver).values()
    return str(decision.fingerprint)


@pytest.mark.parametrize("changed", FILES)
def test_a_change_of_any_file_changes_the_fingerprint(folder: Path, changed: str) -> None:
    before = fingerprint()
    assert fingerprint() == before
    file = folder / changed
    file.write_text(file.read_text() + ("# changed\n" if changed.endswith(("py", "yaml", "yml")) else "\n"))
    assert fingerprint() != before


def test_a_file_more_that_a_pattern_names_changes_the_fingerprint(folder: Path) -> None:
    before = fingerprint()
    (folder / "items/3.jsonl").write_text("{}\n")
    assert fingerprint() != before


@pytest.mark.parametrize("options", ["data_dir: copy", "data_files: copy/a.jsonl", "data_files: [copy/a.jsonl]"])
def test_a_folder_and_single_files(folder: Path, options: str) -> None:
    (folder / "tasks/mine.yaml").write_text(f"task: mine\ndataset_path: json\ndataset_kwargs: {{{options}}}\n")
    (folder / "copy").mkdir()
    (folder / "copy/a.jsonl").write_text("{}\n")
    before = fingerprint()
    (folder / "copy/a.jsonl").write_text("[]\n")
    assert fingerprint() != before


def test_a_data_set_in_a_folder(folder: Path) -> None:
    (folder / "tasks/mine.yaml").write_text("task: mine\ndataset_path: copy\n")
    (folder / "copy").mkdir()
    (folder / "copy/a.jsonl").write_text("{}\n")
    before = fingerprint()
    (folder / "copy/a.jsonl").write_text("[]\n")
    assert fingerprint() != before


def test_the_plan_shows_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.yaml", "--plan"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    outside = ["../items/1.jsonl", "../items/2.jsonl", "../one.csv", "../shared/common.yaml"]
    outside += ["../shared/deeper/basis.yml", "../two.csv", "../words/list.txt", "../words/more.txt"]
    assert f"reads bench[base]: {', '.join(outside)} " in said
    assert "Python of the tasks in ./tasks runs; it can read files that are not tracked" in said
    assert main(["r.yaml", "--plan", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["reads"] == outside
