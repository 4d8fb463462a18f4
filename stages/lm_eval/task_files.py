"""Files outside a folder of lm-eval tasks that its task files name: included task files, data and Python.

A change of one of them changes the scores as much as a change of a task does. lm-eval resolves `include` and functions
from the folder of the task file, and datasets resolves data files from the current folder. Imports neither lm_eval nor
torch, because every plan reads task files.
"""

import ast
import contextlib
import os
from collections.abc import Iterator
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import yaml

FUNCTION = "!function "


class _TaskLoader(yaml.CSafeLoader):
    """Reads `!function module.name` as text."""


_TaskLoader.add_multi_constructor("!", lambda _, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


def outside_files(folder: Path) -> dict[str, Path]:
    """Return the files and folders outside `folder` that its task files and their Python name, by path from there.

    What Python opens is known only where it has the path as a whole, as text; see `has_python`.
    """
    folder = folder.resolve()
    outside = sorted({path for file in _all_files(folder) if not (path := file.resolve()).is_relative_to(folder)})
    return {os.path.relpath(path, folder): path for path in outside}


def has_python(folder: Path) -> bool:
    """Whether tasks run Python, which can read files that nobody can list."""
    files = _all_files(folder.resolve())
    tasks = [_read_task(file, file.stat().st_mtime_ns) for file in files if _is_task(file)]
    return any(file.suffix == ".py" for file in files) or any(
        text.startswith(FUNCTION) for task in tasks for text in _texts(task)
    )


def _all_files(folder: Path) -> set[Path]:
    """The task files and the Python in a folder, and all that they name. Only regular files are read."""
    queue = [file for pattern in ("*.yaml", "*.yml", "*.py") for file in folder.rglob(pattern)]
    current, seen = Path.cwd(), set[Path]()
    while queue:
        file = queue.pop()
        if file in seen or not file.exists():
            continue
        seen.add(file)
        if _is_task(file):
            queue += _named_by_task(file, current)
        elif file.suffix == ".py" and file.is_file():
            queue += _named_by_python(file, current)
    return seen


def _is_task(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml") and file.is_file()


def _named_by_task(file: Path, current: Path) -> Iterator[Path]:
    task = _read_task(file, file.stat().st_mtime_ns)
    include = task.get("include") or []
    yield from (file.parent / str(name) for name in (include if isinstance(include, list) else [include]))
    for text in _texts(task):
        if text.startswith(FUNCTION):
            yield file.parent / f"{text.removeprefix(FUNCTION).rpartition('.')[0].replace('.', '/')}.py"
    if data_set := task.get("dataset_path"):
        yield current / str(data_set)
    options = task.get("dataset_kwargs") or {}
    for text in _texts([options.get("data_files"), options.get("data_dir")] if isinstance(options, dict) else []):
        base = str(options.get("data_dir") or "")
        for place in (current, current / base):
            yield from map(Path, glob(str(place / text), recursive=True))  # noqa: PTH207  # of an absolute path, too


def _named_by_python(file: Path, current: Path) -> Iterator[Path]:
    for text in _strings_in_python(file, file.stat().st_mtime_ns):
        for place in (file.parent, current):
            with contextlib.suppress(OSError, ValueError):  # a text that no file can have as its name
                if (path := place / text).is_file():
                    yield path


@cache
def _read_task(file: Path, modified: int) -> dict[str, Any]:
    """The content of a task file; empty if it is not valid, which lm-eval reports."""
    try:
        task = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)  # extends the safe loader
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}
    return task if isinstance(task, dict) else {}


@cache
def _strings_in_python(file: Path, modified: int) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (SyntaxError, ValueError, OSError):
        return []
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in strings if 0 < len(text) < 1_000]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
