"""Broken copies of the real recipes, by the hundred: what is certainly wrong is named with its place and key.

Whatever stands in a file, the command plans it or says what is wrong; it never breaks down and never writes.
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
"""Of the recipes of the paper, those that differ from others in a few values."""
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob("*.yaml")
    if "tasks" not in path.parts and not path.stem.endswith(ALIKE)
)
BLIND = 100
"""Copies for each recipe and blind mutator."""


@dataclass(frozen=True)
class Entry:
    """A key of a recipe, or an item of a list, as PyYAML finds it."""

    path: tuple[str, ...]
    key: tuple[int, int] | None
    """Line and column, from 0; None for items."""
    value: tuple[int, int]
    end: tuple[int, int]
    text: str | None
    """A scalar's."""


@dataclass(frozen=True)
class Mutant:
    """A broken recipe, and what must be said of it."""

    what: str
    text: str
    said: str
    """A regular expression."""


def entries(text: str) -> list[Entry]:
    """Every key and item of a recipe, each where it is written; what an alias repeats is left out."""
    found: list[Entry] = []
    seen: set[int] = set()

    def walk(node: yaml.Node, path: tuple[str, ...], key: yaml.Mark | None) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        start, end = node.start_mark, node.end_mark
        place = (key.line, key.column) if key else None
        found.append(Entry(path, place, (start.line, start.column), (end.line, end.column), text))
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value != "<<":
                    walk(value, (*path, name.value), name.start_mark)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, str(index)), None)

    walk(yaml.compose(text, yaml.SafeLoader), (), None)
    return found[1:]


def replaced(text: str, start: tuple[int, int], end: tuple[int, int], new: str) -> str:
    """`text` with what stands between two places replaced by `new`."""
    lines = text.split("\n")
    head, tail = lines[start[0]][: start[1]], lines[end[0]][end[1] :]
    return "\n".join([*lines[: start[0]], head + new + tail, *lines[end[0] + 1 :]])


def at(place: tuple[int, int], path: tuple[str, ...]) -> str:
    """What a message about the key at `place` begins with."""
    return rf"fuzz\.yaml:{place[0] + 1}:{place[1] + 1}: {re.escape('.'.join(path))}: "


def is_free(path: tuple[str, ...]) -> bool:
    """Whether any name or value may stand there: names of stages, splits, and what goes to a library unseen."""
    return len(path) == 2 or (path[-2:-1] == ("data",) and "tasks" in path) or "model_init_kwargs" in path[:-1]


def values(text: str, wanted: Callable[[Entry], bool], new: str, what: str) -> Iterator[Mutant]:
    """Every value that is `wanted` replaced by `new`."""
    for entry in entries(text):
        if entry.text is not None and wanted(entry):
            changed = replaced(text, entry.value, entry.end, new)
            yield Mutant(f"{what}: {'.'.join(entry.path)}", changed, at(entry.value, entry.path))


def misspelt_keys(text: str) -> Iterator[Mutant]:
    for entry in entries(text):
        if entry.key and not is_free(entry.path):
            end = (entry.key[0], entry.key[1] + len(entry.path[-1]))
            path = (*entry.path[:-1], entry.path[-1] + "q")
            place, said = entry.key, "is no axis; did you mean" if path[0] == "matrix" else "unknown key"
            if path[-2:-1] == ("columns",):
                place, said = (entry.value[0], entry.value[1] + 1), f"'{path[-1]}' is no column that this format reads"
            yield Mutant(f"misspelt {path}", replaced(text, entry.key, end, path[-1]), at(place, path) + said)


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
    """The keys in lines of their own, with their lines."""
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
                said = rf"fuzz\.yaml:\d+:\d+: {re.escape('.'.join(named))}: (is missing|needs 'kind')"
                yield Mutant(f"missing {entry.path}", changed, said)


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
    said = r"fuzz\.yaml:\d+:\d+: not valid YAML: "
    for number in range(0, len(lines), 4):
        for new in ("\tq: 1", "]", "}", "@", 'q: "', "*qqq", "q: *qqq", "\0", "- q: [", "--- !<"):
            if new != "- q: [" or number:
                yield Mutant(
                    f"{new!r} before line {number + 1}", "\n".join([*lines[:number], new, *lines[number:]]), said
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
    """The recipes and all that they refer to, with next to nothing in each file."""
    made = tmp_path_factory.mktemp("recipes")
    for file in ROOT.rglob("*"):
        if file.is_file() and file.suffix in {".json", ".jsonl", ".yaml", ".csv"}:
            (made / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            is_recipe = str(file.relative_to(ROOT)) in RECIPES
            is_whole = is_recipe or file.suffix in {".csv", ".yaml"}
            (made / file.relative_to(ROOT)).write_text(file.read_text() if is_whole else "{}")
    return made


def plan(folder: Path, recipe: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status and the complaints of the command; nothing may be written."""
    file = (folder / recipe).with_name("fuzz.yaml")
    file.write_bytes(content)
    runs = folder / "runs"
    status = main([str(file), "--plan", "--runs", str(runs)])
    file.unlink()
    assert not runs.exists()
    return status, capsys.readouterr().err


@pytest.mark.parametrize("mutate", CERTAIN, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_wrong_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], recipe: str, mutate: Callable[[str], Iterator[Mutant]]
) -> None:
    for mutant in mutate((ROOT / recipe).read_text()):
        status, said = plan(folder, recipe, mutant.text.encode(), capsys)
        assert status == 2, mutant.what
        assert re.search(mutant.said, said), f"{mutant.what}: {mutant.said} is not in {said}"


def any_bytes(draw: random.Random, text: bytes) -> bytes:
    """Some bytes become others."""
    content = bytearray(text)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def lines_about(draw: random.Random, text: bytes) -> bytes:
    """Lines are left out, repeated, swapped or shifted."""
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
    """Some values become strange ones."""
    changed = text.decode()
    for _ in range(draw.randint(1, 3)):
        try:
            entry = draw.choice([entry for entry in entries(changed) if entry.text is not None])
        except yaml.YAMLError:
            break
        changed = replaced(changed, entry.value, entry.end, draw.choice(VALUES))
    return changed.encode()


def odd_text(draw: random.Random, text: bytes) -> bytes:
    """Other line ends, marks, widths and signs, all through the file."""
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
def test_nothing_breaks_the_command(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    mutate: Callable[[random.Random, bytes], bytes],
) -> None:
    for number in range(BLIND):
        content = mutate(random.Random(f"{recipe} {mutate.__name__} {number}"), (ROOT / recipe).read_bytes())
        status, said = plan(folder, recipe, content, capsys)
        assert status in (0, 2), f"number {number}: {said}"
        assert (status == 2) == bool(said), f"number {number}: {said}"
        assert "Traceback" not in said, f"number {number}"


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
    status, said = plan(folder, "wit_dpo.yaml", HOSTILE[case].encode(), capsys)
    assert status == 2
    assert re.search(r"fuzz\.yaml:\d+:\d+: ", said), said
    assert len(said) < 2_000_000
