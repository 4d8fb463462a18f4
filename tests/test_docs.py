"""Every command in README and docs/ works, and every recipe in them is valid.

A command that would train or download runs with --plan, which reads the recipe and all options and plans every step.
`make test-slow` runs the default recipe.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
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
from pipeline.recipe.loader import load

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = ("run-recipe", "pytest", "python", "make", "pip")
OTHERS = {
    "lm_eval": "tests/test_published.py runs it on a published model",
    "sbatch": "tests/test_slurm.py runs its script",
    "tensorboard": "tests/test_published.py reads its files",
    "vllm": "needs a GPU; tests/gpu/test_models.py",
    "export": "sets variables",
    "rsync": "needs a second machine",
    ".": "a shell builtin",
    ".venv/bin/pre-commit": "would change this clone; tests/test_contributing.py checks its hooks",
}
"""Programs in the pages that do not run here, with the reason."""
NOT_RUN = {
    "make test": "would run this test",
    "make lock": "needs uv",
    "python -m benchmarks.main_job RECIPE": "a template",
    "run-recipe RECIPE [option]...": "a template",
}
QUICK_OPTIONS = ("--plan", "--verify", "--status", "--help", "--preview", "--estimate", "--prefetch", "--check")
"""With one of these options a command is quick."""


RUN: set[tuple[str, ...]] = set()
"""Recipes and arguments that have run: several pages show the same commands."""
COUNT = """
import contextlib, io, json, shlex, sys
import pytest

class Counter:
    def pytest_collection_finish(self, session):
        self.count = len(session.items)

counts = {}
for line in json.load(sys.stdin):
    counter = Counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", *shlex.split(line)[1:]], [counter])
    counts[line] = counter.count
print(json.dumps(counts))
"""


def code_of(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks, and inline code."""
    text = page.read_text(encoding="utf-8")
    for fenced in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL):
        yield from fenced.splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(r"^(?: {4,})(.+)$", text, re.MULTILINE)
    yield from (code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", text))


def commands_of(page: Path) -> list[str]:
    """List the commands in a page, without comments and variables."""
    lines = (re.sub(r"\s+#\s.*", "", line).strip().removeprefix("$ ") for line in code_of(page))
    lines = (re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines)
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in PROGRAMS and line not in PROGRAMS[1:]))


def shell_of(page: Path) -> Iterator[str]:
    """Yield the programs in the page's indented blocks of commands, if a block calls one of PROGRAMS."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in re.findall(r"\n\n((?: {4}.+\n)+)", text):
        lines = block.replace("\\\n", " ").splitlines()
        programs = [re.sub(r"^([A-Z_]+=\S+ )+", "", line.strip()).split()[0] for line in lines]
        if set(programs) & set(PROGRAMS):
            yield from programs


def recipes_of(page: Path) -> list[str]:
    """List the recipes in a page, complete or in part."""
    return [textwrap.dedent(text) for text in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]


def complete(text: str) -> str:
    """Complete a recipe of which a page shows a part."""
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
    """A folder like a clone, one per test."""
    for name in ("recipes", "docs", "tests", "benchmarks", "pipeline", "stages", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs/store").mkdir(parents=True)
    (tmp_path / "runs/mine").mkdir()
    shutil.copytree(ROOT / "recipes/pocket/model", tmp_path / "runs/mine/wit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def collected() -> dict[str, int]:
    """Map each pytest command in the pages to the number of tests it selects."""
    lines = [param.values[1] for param in COMMANDS if str(param.values[1]).startswith("pytest ")]
    call = [sys.executable, "-c", COUNT]
    done = subprocess.run(call, input=json.dumps(lines), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_the_pages_have_commands_and_recipes() -> None:
    assert len(COMMANDS) > 40
    assert len(RECIPES) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_program_is_known(page: Path) -> None:
    assert set(shell_of(page)) <= {*PROGRAMS, *OTHERS}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_the_trainer_examples_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program in docs/trainer.md; then the one in README with the same model and rows."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainer.md").read_text("utf-8"), re.DOTALL)
    (readme,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    loss, used = capsys.readouterr().out.splitlines()[-2:]
    assert 0 < float(loss) < 20
    assert "8" in used
    readme = readme.replace("0.8)", "0.8, bf16=torch.cuda.is_available(), max_steps=1, report_to='none')")
    exec(readme, names | {"dataset": names["rows"]})


@pytest.mark.parametrize(("page", "text"), RECIPES)
def test_a_recipe_is_valid(page: Path, text: str, folder: Path) -> None:
    (folder / "shown.yaml").write_text(complete(text))
    is_part = "name" not in yaml.safe_load(text)
    expected = ["'bits' is unknown", *(["is missing"] if is_part else [])]  # bits: the kind that docs/stages.md adds
    problems = [problem.text for problem in load(Path("shown.yaml"))[0].problems]
    assert [problem for problem in problems if not any(text in problem for text in expected)] == []


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_works(
    page: Path, line: str, folder: Path, collected: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    if line in NOT_RUN:
        return
    words = [word for word in shlex.split(line) if "=" not in word or not word.split("=")[0].isupper()]
    program, *arguments = (word.replace("/data/", "data/") for word in words)
    if program == "run-recipe":
        run_recipe(page, arguments, folder, capsys)
    elif program == "pytest":
        assert collected[line] > 0, "it selects no test"
    elif program == "python":
        assert arguments[0] == "-m"
        module = importlib.import_module(arguments[1])
        main = Path(str(module.__file__))
        assert "__main__" in (main.with_name("__main__.py") if hasattr(module, "__path__") else main).read_text()
    elif program == "make":
        assert subprocess.run(["make", "-n", *arguments], capture_output=True, check=False, cwd=ROOT).returncode == 0
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for names in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(names.split(",")) <= extras.keys()


def run_recipe(page: Path, arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command; a recipe of the reader's own is replaced by one from the page."""
    for index, word in enumerate(arguments):
        if word in ("R.yaml", "RECIPE", "R", "mine.yaml"):
            arguments[index] = write_recipe(page, arguments, folder)
    if arguments and not set(arguments) & set(QUICK_OPTIONS):
        arguments = [*arguments, "--plan"]
    shown = folder / "shown.yaml"
    call = (shown.read_text() if shown.exists() else "", *arguments)
    if call in RUN:
        return
    RUN.add(call)
    status, errors = cli.main(arguments), capsys.readouterr().err
    if "--status" in arguments:
        assert (status, "has no record of a run" in errors) == (2, True)
    elif status == 2:  # a single stage, whose inputs have no result yet
        assert re.search("make it first by run-recipe", errors), errors
    else:
        assert status == 0, errors


def write_recipe(page: Path, arguments: list[str], folder: Path) -> str:
    """Write a recipe in place of the reader's own."""
    needs_model = {"--cells", "--check", "--preview", "--estimate", "--prefetch"} & set(
        arguments
    )  # which must be local
    if page.stem == "grid" or (page.stem == "README" and not needs_model):
        text = complete(recipes_of(page)[0])
        for name in re.findall(r"\./(\w+\.jsonl)", text):
            (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
    else:
        text = f"extends: recipes/{'pocket_grid' if '--cells' in arguments else 'wit_dpo'}.yaml\n"
    (folder / "shown.yaml").write_text(text)
    return "shown.yaml"
