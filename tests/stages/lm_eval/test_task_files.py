"""Code and files that tasks name are found however they are written, and finding them ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.base import UserError
from stages.lm_eval.task_files import has_python, outside_files

TASK = "task: evil\ndataset_path: json\noutput_type: multiple_choice\n"
CODE = "!function ROOT/other/code.f"
WRITTEN = {
    "plain": f"process_docs: {CODE}\n",
    "key": f"metadata: {{? {CODE} : 1}}\n",
    "replaced by a later key": f"process_docs: {CODE}\nprocess_docs: null\n",
    "set": f"metadata: {{a: !!set {{? {CODE} }}}}\n",
    "pairs": f"metadata: !!pairs [a: {CODE}]\n",
    "replaced in a merge": f"a: &a {{process_docs: {CODE}}}\n<<: *a\nprocess_docs: null\n",
    "verbatim tag": "process_docs: !<!function> ROOT/other/code.f\n",
    "included": "include: ../other/base.txt\n",
    "included by an alias": "x: &x ../other/base.txt\ninclude: *x\n",
    "included by an alias of a list": "x: &x [../other/base.txt]\ninclude: *x\n",
    "included in a merge": "x: &x {include: ../other/base.txt}\n<<: *x\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/code.py").write_text("def f(docs):\n    return docs\n")
    (tmp_path / "other/base.txt").write_text("process_docs: !function code.f\n")
    return tmp_path / "tasks"


@pytest.mark.parametrize("text", [TASK + text for text in WRITTEN.values()], ids=WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_code_is_found_in_any_spelling(folder: Path, text: str, encoding: str) -> None:
    (folder / "evil.yaml").write_text(text.replace("ROOT", str(folder.parent)), encoding)
    assert has_python(folder)
    included = {"../other/base.txt"} if "base.txt" in text else set()
    assert set(outside_files(folder)) == {"../other/code.py"} | included


def test_a_tag_directive_hides_nothing(folder: Path) -> None:
    (folder / "evil.yaml").write_text(f"%TAG !e! !func\n---\n{TASK}process_docs: !e!tion code.f\n")
    assert has_python(folder)


def test_a_task_without_code_has_none(folder: Path) -> None:
    (folder / "good.yaml").write_text(f"{TASK}doc_to_text: '!function other.f'\n")
    assert not has_python(folder)
    assert outside_files(folder) == {}


def test_lists_and_mappings_name_no_file_themselves(folder: Path) -> None:
    (folder / "a.yaml").write_text(f"{TASK}dataset_kwargs: {{data_files: {{test: [none.csv]}}}}\ninclude: []\n")
    assert outside_files(folder) == {}


LISTS = "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 10))
MERGES = "".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 10}]}}\n" for i in range(1, 30))
ODD = {
    "lists of aliases": f"a0: &a0 [{'x,' * 10}]\n{LISTS}",
    "merges of aliases": f"a0: &a0 {{x: 1}}\n{MERGES}",
    "dates": "x: 2001-99-99\ny: !!int abc\nz: !!timestamp zz\n",
    "cycle": "x: &a [*a]\n",
    "long name": f"include: {'x' * 300}\n",
    "itself": "include: [../tasks/evil.yaml, ../tasks/../tasks/evil.yaml]\n",
    "broken": "include: [\n",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_task_file_stops_nothing(folder: Path, text: str) -> None:
    (folder / "evil.yaml").write_text(TASK + text)
    assert outside_files(folder) == {}


def test_odd_python_stops_nothing(folder: Path) -> None:
    for number, code in enumerate(("x = " + "-" * 50_000 + "1", "1" + "+1" * 50_000, "x = '\0'", "\xff")):
        (folder / f"c{number}.py").write_bytes(code.encode("latin-1"))
    assert has_python(folder)
    assert outside_files(folder) == {}


@pytest.mark.parametrize("first", ["a", "z"])
def test_what_python_names_and_a_task_includes_is_read_as_a_task(folder: Path, first: str) -> None:
    (folder / f"{first}.py").write_text("open('../other/base.txt')\n")
    (folder / "evil.yaml").write_text(f"{TASK}include: ../other/base.txt\n")
    assert set(outside_files(folder)) == {"../other/base.txt", "../other/code.py"}


def test_a_task_file_that_would_crash_libyaml_is_named(folder: Path) -> None:
    (folder / "evil.yaml").write_text(f"{TASK}x: {'[' * 60_000}\n")
    with pytest.raises(UserError, match=r"evil\.yaml: is nested deeper than 100 levels; make it flatter"):
        outside_files(folder)


def test_a_pattern_over_the_whole_disk_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lm_eval.task_files.SECONDS", 0.2)
    (folder / "evil.yaml").write_text(f'{TASK}dataset_kwargs: {{data_files: "/**/{os.urandom(8).hex()}"}}\n')
    with pytest.raises(UserError, match=r"to find the files that its tasks name takes longer than 0\.2"):
        outside_files(folder)
