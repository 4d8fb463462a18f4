"""What README and docs/ tell a reader to do works: every command in them is run or looked up, every recipe is read.

A command that would train or fetch is run with --plan, which reads the recipe and every option and plans every step;
`make test-slow` runs the default recipe whole.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.recipe import loader as recipes

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = ("run-recipe", "pytest", "python", "make", "pip")
OTHERS = {
    "lm_eval": "tests/test_published.py runs it on a published model",
    "sbatch": "tests/test_slurm.py runs the script that it is given",
    "tensorboard": "tests/test_published.py reads the files that it shows",
    "vllm": "needs a GPU; tests/gpu/test_models.py",
    "export": "sets variables",
    "rsync": "needs a second machine",
    ".": "the shell's",
    ".venv/bin/pre-commit": "would change this clone; tests/test_contributing.py looks at what it runs",
}
"""Programs that pages show and that are not run here, each with the reason."""
NOT_RUN = {
    "make test": "would run this",
    "make lock": "needs uv",
    "python benchmarks/main_job.py RECIPE": "a form, whose parts are run",
    "run-recipe RECIPE [option]...": "a form",
}
INSTEAD = ("--plan", "--verify", "--status", "--help", "--preview", "--estimate", "--prefetch")
"""Options with which a command is quick as it stands."""


RUN: set[tuple[str, ...]] = set()
"""Recipes and arguments that were run: several pages show the same."""
COUNT = """
import contextlib, io, json, shlex, sys
import pytest

class Counter:
    def pytest_collection_finish(self, session):
        self.found = len(session.items)

counts = {}
for line in json.load(sys.stdin):
    counter = Counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", *shlex.split(line)[1:]], [counter])
    counts[line] = counter.found
print(json.dumps(counts))
"""


def code_of(page: Path) -> Iterator[str]:
    """Every line of code and every piece of it within a line, without comments."""
    text = page.read_text(encoding="utf-8")
    for fenced in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL):
        yield from fenced.splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(r"^(?: {4,})(.+)$", text, re.MULTILINE)
    yield from (piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", text))


def commands_of(page: Path) -> list[str]:
    """The commands in a page."""
    lines = (re.sub(r"\s+#\s.*", "", line).strip().removeprefix("$ ") for line in code_of(page))
    lines = (re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines)
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in PROGRAMS and line not in PROGRAMS[1:]))


def shell_of(page: Path) -> Iterator[str]:
    """The programs in the page's indented blocks of commands: those in which one line at least calls one of ours."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in re.findall(r"\n\n((?: {4}.+\n)+)", text):
        lines = block.replace("\\\n", " ").splitlines()
        programs = [re.sub(r"^([A-Z_]+=\S+ )+", "", line.strip()).split()[0] for line in lines]
        if set(programs) & set(PROGRAMS):
            yield from programs


def recipes_of(page: Path) -> list[str]:
    """The recipes in a page, whole ones and stages of one."""
    return [textwrap.dedent(text) for text in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]


def whole(text: str) -> str:
    """A recipe around what a page shows of one."""
    values = yaml.safe_load(text)
    if "train" in values:
        values = {"shown": {"kind": "sft"} | values}
    if "kind" in next(iter(values.values())):
        values = {"stages": values}
    if "stages" in values or "extends" in values:
        values = {"name": "shown", "model": "org/model"} | values
    return yaml.safe_dump(values, sort_keys=False)


COMMANDS = [pytest.param(page, line, id=f"{page.stem}: {line}") for page in PAGES for line in commands_of(page)]
RECIPES = [pytest.param(page, text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(recipes_of(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a clone, in which what a command leaves is not left to the next."""
    for name in ("recipes", "docs", "tests", "benchmarks", "pipeline", "stages", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs/store").mkdir(parents=True)
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/wit").symlink_to(ROOT / "recipes/pocket/model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def collected() -> dict[str, int]:
    """Each call of pytest that is shown -> how many tests it chooses."""
    lines = [param.values[1] for param in COMMANDS if str(param.values[1]).startswith("pytest ")]
    call = [sys.executable, "-c", COUNT]
    done = subprocess.run(call, input=json.dumps(lines), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) > 40
    assert len(RECIPES) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_program_is_shown_that_nobody_tries(page: Path) -> None:
    assert set(shell_of(page)) <= {*PROGRAMS, *OTHERS}


def test_the_trainer_alone_works_as_it_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's program; then what README shows, with the page's model and rows."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainer.md").read_text("utf-8"), re.DOTALL)
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    loss, used = capsys.readouterr().out.splitlines()[-2:]
    assert 0 < float(loss) < 20
    assert "8" in used
    here = shown.replace("0.8)", "0.8, bf16=torch.cuda.is_available(), max_steps=1, report_to='none')")
    exec(here, names | {"dataset": names["rows"]})


@pytest.mark.parametrize(("page", "text"), RECIPES)
def test_a_recipe_that_is_shown_is_read(page: Path, text: str, folder: Path) -> None:
    (folder / "shown.yaml").write_text(whole(text))
    found = recipes.load(Path("shown.yaml"))
    left_out = "name" not in yaml.safe_load(text)  # a part of a recipe may leave out what is required
    aside = ["'bits' is unknown", *(["is missing"] if left_out else [])]  # bits: what docs/stages.md is about
    assert [problem for problem in found[0].problems if not any(said in problem.text for said in aside)] == []


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_that_is_shown_works(
    page: Path, line: str, folder: Path, collected: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    if line in NOT_RUN:
        return
    words = [word for word in shlex.split(line) if "=" not in word or not word.split("=")[0].isupper()]
    program, *arguments = (word.replace("/data/", "data/") for word in words)
    if program == "run-recipe":
        run_recipe(page, arguments, folder, capsys)
    elif program == "pytest":
        assert collected[line] > 0, "it chooses no test"
    elif program == "python":
        assert arguments[0] == "-m"
        assert "__main__" in Path(str(importlib.import_module(arguments[1]).__file__)).read_text()
    elif program == "make":
        assert subprocess.run(["make", "-n", *arguments], capture_output=True, check=False, cwd=ROOT).returncode == 0
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(asked.split(",")) <= extras.keys()


def run_recipe(page: Path, arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself; of a recipe that stands for the reader's own, with one that the page shows."""
    for index, word in enumerate(arguments):
        if word in ("R.yaml", "RECIPE", "R", "mine.yaml"):
            arguments[index] = stand_in(page, arguments, folder)
    if arguments and not set(arguments) & set(INSTEAD):
        arguments = [*arguments, "--plan"]
    shown = folder / "shown.yaml"
    whole_call = (shown.read_text() if shown.exists() else "", *arguments)
    if whole_call in RUN:
        return
    RUN.add(whole_call)
    status, said = cli.main(arguments), capsys.readouterr().err
    if "--status" in arguments:
        assert (status, "has no record of a run" in said) == (2, True)
    elif status == 2:  # a single stage, with nothing made before it
        assert re.search("make it first by run-recipe", said), said
    else:
        assert status == 0, said


def stand_in(page: Path, arguments: list[str], folder: Path) -> str:
    """A recipe in the place of the reader's own."""
    looks_in = {"--cells", "--preview", "--estimate", "--prefetch"} & set(arguments)  # at a model that is here
    if page.stem == "grid" or (page.stem == "README" and not looks_in):
        text = whole(recipes_of(page)[0])
        for name in re.findall(r"\./(\w+\.jsonl)", text):
            (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
    else:
        text = f"extends: recipes/{'pocket_grid' if '--cells' in arguments else 'wit_dpo'}.yaml\n"
    (folder / "shown.yaml").write_text(text)
    return "shown.yaml"
