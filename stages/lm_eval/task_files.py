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
from typing import NamedTuple

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
    """The keys that lead to it."""
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
    current, found = Path.cwd(), dict[Path, bool]()
    try:
        with limited(SECONDS):
            while queue:
                file = queue.pop().resolve()
                if file in found or not _exists(file):
                    continue
                found[file] = False
                if file in tasks and file.is_file():
                    texts = _read_task(file, file.stat().st_mtime_ns)
                    found[file] = any(text.tag == FUNCTION for text in texts)
                    included = [file.parent / each.text for each in texts if each.text and each.keys == ("include",)]
                    tasks |= {path.resolve() for path in included}
                    queue += [*included, *_named_by_task(file, texts, current)]
                elif file.suffix == ".py" and file.is_file():
                    queue += _named_by_python(file, current)
    except LimitExceeded as error:
        raise UserError(
            f"{folder}: to find the files that its tasks name {error}; name fewer, or no patterns"
        ) from None
    return found


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
        elif each.keys[:2] in (("dataset_kwargs", "data_files"), ("dataset_kwargs", "data_dir")):
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
    """All texts of a task file, up to the first place that is not valid, which lm-eval reports. Builds no value.

    An alias stands for the texts of its anchor, but not for those of aliases in it. Raises UserError.
    """
    texts: list[_Text] = []
    anchors: dict[str, list[_Text]] = {}
    opened: list[_Collection] = []

    def add(values: list[_Text], is_alias: bool = False) -> None:
        """Add what stands at this place of the innermost collection."""
        keys = opened[-1].keys if opened else ()
        added = [value._replace(keys=(*keys, *value.keys)) for value in values]
        texts.extend(added)
        for each in opened:
            if each.anchor and not is_alias:
                each.texts += [text._replace(keys=text.keys[len(each.start) :]) for text in added]

    with contextlib.suppress(yaml.YAMLError, OSError, UnicodeError):
        for event in yaml.parse(file.read_bytes(), yaml.CSafeLoader):
            if isinstance(event, yaml.NodeEvent) and not isinstance(event, yaml.CollectionStartEvent):
                if isinstance(event, yaml.ScalarEvent):
                    values = [_Text((), event.tag, event.value)]
                    anchors |= {event.anchor: values} if event.anchor else {}
                else:  # an alias
                    values = anchors.get(str(event.anchor), [])
                add(values, isinstance(event, yaml.AliasEvent))
                if opened:
                    opened[-1].next(values[0].text if len(values) == 1 else "")
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(opened) == DEEPEST:
                    raise UserError(f"{file}: is nested deeper than {DEEPEST} levels; make it flatter")
                add([_Text((), event.tag, "")])
                keys = opened[-1].keys if opened else ()
                opened.append(_Collection(keys, isinstance(event, yaml.MappingStartEvent), event.anchor))
            elif isinstance(event, yaml.CollectionEndEvent):
                closed = opened.pop()
                if closed.anchor:
                    anchors[closed.anchor] = closed.texts
                if opened:
                    opened[-1].next("")
    return texts


class _Collection:
    """An open mapping or list of a YAML file."""

    def __init__(self, start: tuple[str, ...], is_mapping: bool, anchor: str | None) -> None:
        self.start, self.is_mapping, self.anchor = start, is_mapping, anchor
        self.texts: list[_Text] = []
        self._key: str | None = None
        """Of a mapping, the key whose value comes next."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that lead to the next value; a merged mapping has none of its own."""
        return self.start if self._key in (None, "<<") else (*self.start, str(self._key))

    def next(self, text: str) -> None:
        """Go on after a key or a value."""
        if self.is_mapping:
            self._key = text if self._key is None else None


@cache
def _strings_in_python(file: Path, modified: int) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in strings if 0 < len(text) < 1_000]
