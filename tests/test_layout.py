"""The structure of the code: small packages, one direction of imports, a map that is complete."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_MODULES = 13
MAX_LINES = 21_175
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "lm_eval", "accelerate"}
KINDS = {"sft", "dpo", "lm_eval", "judge", "sensitivity", "characteristics", "report", "push"}
FILES = sorted(file for top in ("pipeline", "stages") for file in (ROOT / top).rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported_names(file: Path) -> set[str]:
    """The absolute names that a file imports anywhere, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own_imports(file: Path) -> set[str]:
    """The modules of this project that a file imports."""
    modules = {name if name in MODULES else name.rpartition(".")[0] for name in imported_names(file)}
    return modules & MODULES.keys() - {module_of(file)}


IMPORTS = {module: own_imports(file) for module, file in MODULES.items()}


def package_of(module: str) -> str:
    """The folder of a module; modules directly in pipeline/ and stages/, and the packages themselves, stand alone."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else module


def test_files_import_in_one_direction() -> None:
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError with the modules of a circle


def test_folders_import_in_one_direction() -> None:
    folders: dict[str, set[str]] = {}
    for module, sources in IMPORTS.items():
        folders.setdefault(package_of(module), set()).update(package_of(source) for source in sources)
    list(TopologicalSorter({name: sources - {name} for name, sources in folders.items()}).static_order())


def test_stages_know_nothing_of_the_pipeline_and_kinds_nothing_of_each_other() -> None:
    for module, sources in IMPORTS.items():
        kind = module.split(".")[1] if module.startswith("stages.") else None
        for source in sources if kind not in (None, "kinds") else ():
            other = source.split(".")[1] if source.startswith("stages.") else None
            assert not source.startswith("pipeline"), f"{module} imports {source}"
            assert other not in KINDS - {kind}, f"{module} imports {source}"


def test_the_pipeline_imports_no_heavy_library() -> None:
    for module, file in MODULES.items():
        if module.startswith("pipeline"):
            assert not HEAVY & {name.partition(".")[0] for name in imported_names(file)}, module


def test_what_starts_beside_every_step_imports_no_library() -> None:
    code = "import sys, pipeline.run.masked_log; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"pydantic", "yaml", "numpy"} & set(output.split())


def test_packages_are_small_and_say_what_they_are_for() -> None:
    modules = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert not {str(folder): count for folder, count in modules.items() if count > MAX_MODULES}
    for folder in modules:
        init = folder / "__init__.py"
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{init} has no docstring"
    for file in FILES:
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no docstring"


def test_module_names_are_distinct() -> None:
    """Two modules of one folder do not differ by a suffix only."""
    for folder in {file.parent for file in FILES}:
        names = sorted(file.stem for file in folder.glob("*.py"))
        for first, second in itertools.pairwise(names):
            assert not re.fullmatch(rf"{re.escape(first)}[a-z]{{1,3}}", second), (folder, first, second)


def test_the_code_stays_within_its_budget() -> None:
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in FILES) <= MAX_LINES


@pytest.mark.parametrize("top", ["pipeline", "stages"])
def test_the_map_lists_every_module(top: str) -> None:
    """CONTRIBUTING opens with a tree: one line for each folder and module, with what it is for."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("```")[1]
    listed, folders = set(), [""]
    for line in tree.splitlines():
        if match := re.fullmatch(r"( *)(\w+)(/|\.py) +\S.*", line):
            depth = len(match[1]) // 2
            folders[depth:] = [match[2]]
            if match[3] == ".py":
                listed.add("/".join([*folders[:depth], f"{match[2]}.py"]))
            else:
                listed.add("/".join(folders[: depth + 1]) + "/")
    files = {str(file.relative_to(ROOT)) for file in FILES if file.name != "__init__.py"}
    packages = {f"{file.parent.relative_to(ROOT)}/" for file in FILES}
    expected = {name for name in files | packages if name.startswith(top)}
    assert {name for name in listed if name.startswith(top)} == expected


def test_no_dialect_comes_back() -> None:
    """Plain English: phrases that earlier versions overused. docs/ and README.md are not covered yet."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    problems = []
    for name in tracked:
        covered = name.startswith(("pipeline/", "stages/", "benchmarks/", "tests/", ".ci/"))
        if (name.endswith((".py", ".jinja")) and covered) or name in ("CONTRIBUTING.md", "CHANGELOG.md", "Makefile"):
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                if (match := DIALECT.search(line)) and name != "tests/test_layout.py":
                    problems.append(f"{name}:{number}: {match[0]}")
    assert not problems, "\n".join(problems)


DIALECT = re.compile(
    r"\b(is|are|was|be) told\b|\btells? (of|how|what)\b|\bmend(s|ed|able)?\b|\bwhat (it |a \w+ )?(lacks?|takes)\b"
    r"|\bgo(es)? on (with|from|to)\b|\bfor want of\b|\bis to be had\b|\bmade anew\b|\blikewise\b|\bnear by\b"
    r"|\bstands in (the|a)\b|\bfound out\b",
    re.IGNORECASE,
)


def test_identifiers_name_the_thing_they_hold() -> None:
    problems = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for attribute in ("id", "attr", "arg", "name", "asname"):
                name = getattr(node, attribute, None)
                if name == "GIVEN":  # of Segment: the metrics have it as a key
                    continue
                if isinstance(name, str) and {"told", "found", "given", "made"} & set(name.lower().split("_")):
                    problems.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}: {name}")
    assert not problems, "\n".join(problems)
