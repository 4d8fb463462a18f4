"""Mutated copies of the real recipes, by the hundred: certain errors are reported with location and key.

For any file content the command plans or reports an error; it never crashes and never writes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3] / "recipes"
ALIKE = ("_lima", "_alpaca", "_tulu", "_gemma-2-2b", "_llama-3.2-3b", "_llama-3-8b")
"""The paper's recipes that differ from others in a few values only."""
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob("*.yaml")
    if "tasks" not in path.parts and not path.stem.endswith(ALIKE)
)
BLIND = 100
"""Copies for each recipe and blind mutator."""


@dataclass(frozen=True)
class Entry:
    """A key of a recipe, or an item of a list."""

    path: tuple[str, ...]
    key: tuple[int, int] | None
    """Line and column, from 0; None for items."""
    value: tuple[int, int]
    end: tuple[int, int]
    text: str | None
    """A scalar's."""


@dataclass(frozen=True)
class Mutant:
    """A broken recipe and its expected error message."""

    description: str
    text: str
    message: str
    """A regular expression."""


def entries(text: str) -> list[Entry]:
    """Return every key and item of a recipe, without those that an alias repeats."""
    result: list[Entry] = []
    seen: set[int] = set()

    def walk(node: yaml.Node, path: tuple[str, ...], key: yaml.Mark | None) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        start, end = node.start_mark, node.end_mark
        place = (key.line, key.column) if key else None
        result.append(Entry(path, place, (start.line, start.column), (end.line, end.column), text))
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value != "<<":
                    walk(value, (*path, name.value), name.start_mark)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, str(index)), None)

    walk(yaml.compose(text, yaml.SafeLoader), (), None)
    return result[1:]


def replaced(text: str, start: tuple[int, int], end: tuple[int, int], new: str) -> str:
    """Replace the text between two positions by `new`."""
    lines = text.split("\n")
    head, tail = lines[start[0]][: start[1]], lines[end[0]][end[1] :]
    return "\n".join([*lines[: start[0]], head + new + tail, *lines[end[0] + 1 :]])


def at(place: tuple[int, int], path: tuple[str, ...]) -> str:
    """Return the start of a message about the key at `place`."""
    return rf"fuzz\.yaml:{place[0] + 1}:{place[1] + 1}: {re.escape('.'.join(path))}: "


def is_free(path: tuple[str, ...]) -> bool:
    """Whether any name or value is allowed: names of stages and splits, and options passed to a library."""
    return len(path) == 2 or (path[-2:-1] == ("data",) and "tasks" in path) or "model_init_kwargs" in path[:-1]


def values(text: str, matches: Callable[[Entry], bool], new: str, description: str) -> Iterator[Mutant]:
    """Yield a mutant for each matching value, replaced by `new`."""
    for entry in entries(text):
        if entry.text is not None and matches(entry):
            changed = replaced(text, entry.value, entry.end, new)
            yield Mutant(f"{description}: {'.'.join(entry.path)}", changed, at(entry.value, entry.path))


def misspelt_keys(text: str) -> Iterator[Mutant]:
    for entry in entries(text):
        if entry.key and not is_free(entry.path):
            end = (entry.key[0], entry.key[1] + len(entry.path[-1]))
            path = (*entry.path[:-1], entry.path[-1] + "q")
            place, message = entry.key, "is no axis; did you mean" if path[0] == "matrix" else "unknown key"
            if path[-2:-1] == ("columns",):
                place, message = (
                    (entry.value[0], entry.value[1] + 1),
                    f"'{path[-1]}' is not a column of this format",
                )
            yield Mutant(f"misspelt {path}", replaced(text, entry.key, end, path[-1]), at(place, path) + message)


def unknown_keys(text: str) -> Iterator[Mutant]:
    lines = text.split("\n")
    for entry in entries(text):
        if entry.key and not lines[entry.key[0]][: entry.key[1]].strip() and not is_free(entry.path):
            new = " " * entry.key[1] + "qqq: 1\n"
            path = (*entry.path[:-1], "qqq")
            changed = replaced(text, (entry.key[0], 0), (entry.key[0], 0), new)
            yield Mutant(f"unknown key before {entry.path}", changed, at(entry.key, path) + "unknown key")


def wrong_types(text: str) -> Iterator[Mutant]:
    yield from values(text, lambda e: "model_init_kwargs" not in e.path, "{q: {q: 1}}", "wrong type")


def unknown_kinds(text: str) -> Iterator[Mutant]:
    yield from values(text, lambda e: e.path[-1] == "kind", "qsft", "unknown kind")


def unknown_stages(text: str) -> Iterator[Mutant]:
    def is_stage(entry: Entry) -> bool:
        return entry.path[2:] == ("model",) or entry.path[2:3] == ("models",)

    yield from values(text, is_stage, "qqq", "unknown stage")


def missing_files(text: str) -> Iterator[Mutant]:
    yield from values(text, lambda e: (e.text or "").startswith("./"), "./qqq/q.json", "missing file")


def bad_choices(text: str) -> Iterator[Mutant]:
    chosen = {"lr_scheduler_type", "optim", "format", "rejected", "dtype"}
    yield from values(text, lambda e: e.path[-1] in chosen, "qqq", "bad choice")


def bad_numbers(text: str) -> Iterator[Mutant]:
    counted = {"max_steps", "per_device_train_batch_size", "num_train_epochs", "r", "limit", "batch_size", "seed"}
    for new in ("-3", ".nan", ".inf", "9" * 5000, "1e999", "'1'"):
        yield from values(text, lambda e: e.path[-1] in counted, new, f"{new[:9]} for a number")


def one_liners(text: str) -> Iterator[tuple[Entry, str]]:
    """Yield the keys in lines of their own, with their lines."""
    lines = text.split("\n")
    for entry in entries(text):
        if entry.key and not lines[entry.key[0]][: entry.key[1]].strip() and entry.key[0] == entry.end[0]:
            yield entry, lines[entry.key[0]]


def missing_keys(text: str) -> Iterator[Mutant]:
    for entry, line in one_liners(text) if "\nextends:" not in text else ():  # the other file may have them
        if entry.path[-1] in {"name", "kind", "models", "weights"} and "tasks" not in entry.path:
            changed = text.replace(line + "\n", "", 1) if text.count(line) == 1 else None
            if changed:
                named = entry.path[:-1] if entry.path[-1] == "kind" else entry.path
                message = rf"fuzz\.yaml:\d+:\d+: {re.escape('.'.join(named))}: (is missing|needs 'kind')"
                yield Mutant(f"missing {entry.path}", changed, message)


def repeated_keys(text: str) -> Iterator[Mutant]:
    for entry, line in one_liners(text):
        assert entry.key
        if "&" not in line:
            changed = replaced(text, (entry.key[0], 0), (entry.key[0], 0), line + "\n")
            place = (entry.key[0] + 1, entry.key[1])
            yield Mutant(f"repeated {entry.path}", changed, at(place, entry.path) + "is a duplicate key")


def references_to_nothing(text: str) -> Iterator[Mutant]:
    for new in ("'${qqq.q}'", "'???'", '"${oc.env:HOME}"', "'a ${name'"):
        yield from values(text, lambda e: True, new, f"{new} for a value")


def broken_syntax(text: str) -> Iterator[Mutant]:
    lines = text.split("\n")
    message = r"fuzz\.yaml:\d+:\d+: not valid YAML: "
    for number in range(0, len(lines), 4):
        for new in ("\tq: 1", "]", "}", "@", 'q: "', "*qqq", "q: *qqq", "\0", "- q: [", "--- !<"):
            if new != "- q: [" or number:
                yield Mutant(
                    f"{new!r} before line {number + 1}", "\n".join([*lines[:number], new, *lines[number:]]), message
                )


CERTAIN = [
    misspelt_keys,
    unknown_keys,
    wrong_types,
    unknown_kinds,
    unknown_stages,
    missing_files,
    bad_choices,
    bad_numbers,
    missing_keys,
    repeated_keys,
    references_to_nothing,
    broken_syntax,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes and the files they refer to, almost empty."""
    target = tmp_path_factory.mktemp("recipes")
    for file in ROOT.rglob("*"):
        if file.is_file() and file.suffix in {".json", ".jsonl", ".yaml", ".csv"}:
            (target / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            is_recipe = str(file.relative_to(ROOT)) in RECIPES
            keep_content = is_recipe or file.suffix in {".csv", ".yaml"}
            (target / file.relative_to(ROOT)).write_text(file.read_text() if keep_content else "{}")
    return target


def plan(folder: Path, recipe: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and the error message of the command, which must not write files."""
    file = (folder / recipe).with_name("fuzz.yaml")
    file.write_bytes(content)
    runs = folder / "runs"
    status = main([str(file), "--plan", "--runs", str(runs)])
    file.unlink()
    assert not runs.exists()
    return status, capsys.readouterr().err


@pytest.mark.parametrize("mutate", CERTAIN, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_certain_errors_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], recipe: str, mutate: Callable[[str], Iterator[Mutant]]
) -> None:
    for mutant in mutate((ROOT / recipe).read_text()):
        status, message = plan(folder, recipe, mutant.text.encode(), capsys)
        assert status == 2, mutant.description
        assert re.search(mutant.message, message), f"{mutant.description}: {mutant.message} is not in {message}"


def any_bytes(draw: random.Random, text: bytes) -> bytes:
    """Replace some bytes."""
    content = bytearray(text)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def lines_about(draw: random.Random, text: bytes) -> bytes:
    """Drop, repeat, swap or shift lines."""
    lines = text.split(b"\n")
    for _ in range(draw.randint(1, 4)):
        one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.randrange(4):
            case 0:
                lines[one : one + draw.randint(1, 3)] = [b""]
            case 1:
                lines.insert(one, lines[other])
            case 2:
                lines[one], lines[other] = lines[other], lines[one]
            case 3:
                lines[one] = draw.choice([b" ", b"  ", b"\t", b"- ", b"#"]) + lines[one]
    return b"\n".join(lines)


VALUES = [
    *(
        "",
        "~",
        "yes",
        "-1",
        "0",
        "1e308",
        "0x1F",
        "1:30",
        "1_0",
        "2024-01-01",
        "[]",
        "{}",
        "{a: b}",
        "[1, [2]]",
        "!!set {a}",
    ),
    *("!!python/object:os.system x", "!!binary aGk=", "'\\0'", '"\\0"', '"\\uD800"', '"\\n"', "'${name}'", "${stages}"),
    *(
        "'${stages.it}'",
        "'${a}${b}'",
        "'${.x}'",
        "'\\${x}'",
        "*it",
        "&q q",
        "|",
        ">",
        "? x",
        "<<",
        "=",
        "'é\u202e🦙'",
        "'a/b'",
    ),
    *(
        "'../..'",
        "/",
        "~/x",
        "/dev/null",
        "'org/name'",
        "pypi:x",
        "'[x]'",
        "base",
        "'x[y]'",
        "'" + "a" * 5000 + "'",
        "." * 300,
    ),
]


def any_values(draw: random.Random, text: bytes) -> bytes:
    """Replace some values by unusual ones."""
    changed = text.decode()
    for _ in range(draw.randint(1, 3)):
        try:
            entry = draw.choice([entry for entry in entries(changed) if entry.text is not None])
        except yaml.YAMLError:
            break
        changed = replaced(changed, entry.value, entry.end, draw.choice(VALUES))
    return changed.encode()


def odd_text(draw: random.Random, text: bytes) -> bytes:
    """Change line ends, byte order marks, widths and characters in the complete file."""
    changed = text.decode()
    for old, new in draw.sample(
        [
            ("\n", "\r\n"),
            ("\n", "\u2028"),
            ("\n", "\r"),
            (": ", ":\u00a0"),
            (": ", ":"),
            ("name:", "\ufeffname:"),
            ("name", "\uff4ename"),
            ("{", "{ ? "),
            ("kind", '"kind"'),
            ("kind", "!!str kind"),
            (",", ", ,"),
            ("stages:", "stages: &s\n  <<: *s"),
            ("stages:", "<<: [{q: 1}, 2]\nstages:"),
            ("model", "${name}"),
            ("model: ", "model: ${model}"),
        ],
        draw.randint(1, 2),
    ):
        changed = changed.replace(old, new)
    return changed.encode()


@pytest.mark.parametrize("mutate", [any_bytes, lines_about, any_values, odd_text], ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_never_crashes(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    mutate: Callable[[random.Random, bytes], bytes],
) -> None:
    for number in range(BLIND):
        content = mutate(random.Random(f"{recipe} {mutate.__name__} {number}"), (ROOT / recipe).read_bytes())
        status, message = plan(folder, recipe, content, capsys)
        assert status in (0, 2), f"number {number}: {message}"
        assert (status == 2) == bool(message), f"number {number}: {message}"
        assert "Traceback" not in message, f"number {number}"


HOSTILE = {
    "a billion laughs": "a: &a [q,q,q,q,q,q,q,q,q]\n"
    + "".join(f"{n}: &{n} [{', '.join(9 * [f'*{chr(ord(n) - 1)}'])}]\n" for n in "bcdefghi"),
    "a billion laughs by reference": "a0: [q, q]\n"
    + "".join(f"a{n}: ['${{a{n - 1}}}', '${{a{n - 1}}}']\n" for n in range(1, 35)),
    "a billion characters": "a0: qqqqqqqq\n" + "".join(f"a{n}: '${{a{n - 1}}}${{a{n - 1}}}'\n" for n in range(1, 35)),
    "merged over and over": "a: &a {q: 1}\n"
    + "".join(f"b{n}: &a\n  <<: [*a, *a, *a]\n  q{n}: 1\n" for n in range(500)),
    "a chain of aliases": "a: &a [q]\n" + "a: &a [*a]\n" * 2000,
    "a chain of references": "".join(f"a{n}: '${{a{n + 1}}}'\n" for n in range(2000)),
    "deep brackets": "[" * 100_000,
    "deep braces": "{a: " * 20_000,
    "deep lines": "".join(" " * n + "a:\n" for n in range(1500)),
    "deep dashes": "- " * 50_000,
    "deep keys": "? " * 50_000,
    "a recursive alias": "a: &a {b: *a}\n",
    "a recursive merge": "a: &a\n  <<: *a\n",
    "a recursive reference": "a: ${b}\nb: ${a}\n",
    "itself within itself": "a: {b: '${a}'}\n",
    "many digits": f"seed: {'9' * 100_000}\n",
    "a long key": "a" * 2000 + ": 1\n",
    "many keys": "".join(f"k{n}: 1\n" for n in range(5000)),
    "text alone": "qqq",
    "a number": "1",
    "a byte order mark": "\ufeff- a",
    "comments": "# a\n",
    "two documents": "---\na: 1\n---\na: 1\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    status, message = plan(folder, "wit_dpo.yaml", HOSTILE[case].encode(), capsys)
    assert status == 2
    assert re.search(r"fuzz\.yaml:\d+:\d+: ", message), message
    assert len(message) < 2_000_000
