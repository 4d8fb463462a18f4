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
from typing import Any, NamedTuple

import yaml

from stages.base import UserError
from stages.system.limits import LimitExceeded, limited

FUNCTION = "!function"
DEEPEST = 100
"""Levels of a task file. libyaml, which lm-eval reads it with, crashes on some thousands."""
SECONDS = 20.0
"""Longest time to find the files that a folder of tasks names."""


class _Text(NamedTuple):
    """A text in a task file, as a value, an item of a list or a key."""

    keys: tuple[str, ...]
    """The first two of the keys that lead to it."""
    tag: str | None
    text: str


def outside_files(folder: Path) -> dict[str, Path]:
    """Return the files and folders outside `folder` that its task files and their Python name, by path from there.

    What Python opens is known only where it has the path as a whole, as text; see `has_python`.

    Raises:
        UserError: a task file cannot be read to its end in SECONDS.
    """
    folder = folder.resolve()
    outside = sorted(path for path in _all_files(folder) if not path.is_relative_to(folder))
    return {os.path.relpath(path, folder): path for path in outside}


def has_python(folder: Path) -> bool:
    """Whether tasks run Python, which can read files that nobody can list. Raises UserError as `outside_files` does."""
    files = _all_files(folder.resolve())
    return any(files.values()) or any(file.suffix == ".py" for file in files)


def _all_files(folder: Path) -> dict[Path, bool]:
    """Map the task files and the Python in a folder, and all that they name, to whether they name a function."""
    queue = [file for pattern in ("*.yaml", "*.yml", "*.py") for file in folder.rglob(pattern)]
    tasks = {file.resolve() for file in queue if file.suffix != ".py"}
    current, names_function, seen = Path.cwd(), dict[Path, bool](), set[tuple[Path, bool]]()
    try:
        with limited(SECONDS):
            while queue:
                file = queue.pop().resolve()
                visit = file, file in tasks  # a file that Python names can turn out to be included, too
                if visit in seen or not _exists(file):
                    continue
                seen.add(visit)
                names_function.setdefault(file, False)
                if file in tasks and file.is_file():
                    texts = _read_task(file, file.stat().st_mtime_ns)
                    names_function[file] = any(text.tag == FUNCTION for text in texts)
                    included = [file.parent / each.text for each in texts if each.text and each.keys == ("include",)]
                    tasks |= {path.resolve() for path in included}
                    queue += [*included, *_named_by_task(file, texts, current)]
                elif file.suffix == ".py" and file.is_file():
                    queue += _named_by_python(file, current)
    except LimitExceeded as error:
        raise UserError(
            f"{folder}: to find the files that its tasks name {error}; name fewer, or no patterns"
        ) from None
    return names_function


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text that no file can have as its name
        return False


def _named_by_task(file: Path, texts: list[_Text], current: Path) -> Iterator[Path]:
    directories = [each.text for each in texts if each.keys == ("dataset_kwargs", "data_dir")]
    for each in texts:
        if each.tag == FUNCTION:
            yield file.parent / f"{each.text.rpartition('.')[0].replace('.', '/')}.py"
        elif not each.text:  # of a list or mapping
            continue
        elif each.keys == ("dataset_path",):
            yield current / each.text
        elif each.keys in (("dataset_kwargs", "data_files"), ("dataset_kwargs", "data_dir")):
            for place in (current, *(current / directory for directory in directories)):
                with contextlib.suppress(OSError, ValueError):
                    yield from map(Path, glob(str(place / each.text), recursive=True))  # noqa: PTH207  # absolute, too


def _named_by_python(file: Path, current: Path) -> Iterator[Path]:
    for text in _strings_in_python(file, file.stat().st_mtime_ns):
        for place in (file.parent, current):
            with contextlib.suppress(OSError, ValueError):  # a text that no file can have as its name
                if (path := place / text).is_file():
                    yield path


@cache
def _read_task(file: Path, modified: int) -> list[_Text]:
    """All texts of a task file; none if it is not valid, which lm-eval reports. Builds no value. Raises UserError."""
    try:
        content, depth = file.read_bytes(), 0
        for event in yaml.parse(content, yaml.CSafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{file}: is nested deeper than {DEEPEST} levels; make it flatter")
        return list(_texts(yaml.compose(content, yaml.CSafeLoader), (), set()))
    except (yaml.YAMLError, OSError, UnicodeError):
        return []


def _texts(node: Any, keys: tuple[str, ...], seen: set[tuple[int, tuple[str, ...]]]) -> Iterator[_Text]:
    """Yield the texts of a node, once for each of its places: aliases of aliases have more than can be counted."""
    if node is None or (id(node), keys) in seen:
        return
    seen.add((id(node), keys))
    yield _Text(keys, node.tag, node.value if isinstance(node, yaml.ScalarNode) else "")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _texts(item, keys, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _texts(key, keys, seen)
            name = str(key.value)
            yield from _texts(value, keys if name == "<<" else (*keys, name)[:2], seen)


@cache
def _strings_in_python(file: Path, modified: int) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in strings if 0 < len(text) < 1_000]
