"""The prompts of a row: variants, templates, choices and worked examples, written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.base import UserError
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.sets import Prompts, PromptSet, misspelt, read_sets


def read(folder: Path, row: Any, examples: list[Any] | None = None, **section: Any) -> list[PromptSet]:
    """Read a file of one row, or of several."""
    files = {"data.q": folder / "q.jsonl", "examples.q": folder / "examples.jsonl"}
    rows = row if isinstance(row, list) else [row]
    files["data.q"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    if examples is not None:
        section |= {"examples": "examples.jsonl"}
        files["examples.q"].write_text("".join(json.dumps(example) + "\n" for example in examples))
    return read_sets(Prompts(name="q", data="q.jsonl", **section), files, seed=1)


def texts(folder: Path, row: Any, **section: Any) -> list[str]:
    (prompt_set,) = read(folder, row, **section)
    return [prompt.text(None) for prompt in prompt_set.prompts]


def test_wordings(tmp_path: Path) -> None:
    assert texts(tmp_path, {"prompts": ["Who?", "Which one?", "Who?"]}) == ["Who?", "Which one?"], "each once"
    assert texts(tmp_path, {"prompt": "Who?", "paraphrases": ["Which one?"]}) == ["Who?", "Which one?"]


def test_case_and_templates(tmp_path: Path) -> None:
    vary = {"case": ["upper", "lower"], "templates": ["Q: {prompt}\nA:", "{prompt} {x}"]}
    assert texts(tmp_path, {"prompt": "Who is {he}?"}, vary=vary) == [
        "Q: Who is {he}?\nA:",
        "Q: WHO IS {HE}?\nA:",
        "Q: who is {he}?\nA:",
        "Who is {he}? {x}",
    ]


def test_choices(tmp_path: Path) -> None:
    row = {"prompts": ["Sky?", "The sky?"], "choices": ["blue", "{prompt}"]}
    assert texts(tmp_path, row) == [f"{words}\nA. blue\nB. {{prompt}}\nAnswer:" for words in ("Sky?", "The sky?")]


def test_worked_examples_have_the_template_of_the_prompt(tmp_path: Path) -> None:
    """The prompt itself is never one of them."""
    examples = [
        {"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1},
        {"prompt": "Sun?", "choices": ["old", "new"], "answer": 0},
        {"prompt": "Sea?", "choices": ["wet", "dry"], "answer": "A, wet"},
    ]
    vary = {"templates": ["{prompt} {choices}?", "{choices} {prompt}"]}
    row = {"prompt": "Sky?", "choices": ["up", "down"]}
    (prompt_set,) = read(tmp_path, row, examples, num_fewshot=2, vary=vary)
    first, second = prompt_set.prompts
    assert first.text("Be short.") == (
        "Be short.\n\nSun? A. old\nB. new? A\n\nSea? A. wet\nB. dry? A, wet\n\nSky? A. up\nB. down?"
    )
    assert second.messages("Be short.") == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "A. old\nB. new Sun?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "A. wet\nB. dry Sea?"},
        {"role": "assistant", "content": "A, wet"},
        {"role": "user", "content": "A. up\nB. down Sky?"},
    ]


def test_spelling_errors(tmp_path: Path) -> None:
    """Each copy has one error, of one edit, the same in every run. Numbers stay."""
    words = "Please tell me what 1234 plus 5678 makes"
    original, *copies = texts(tmp_path, {"prompt": words}, vary={"spelling": 6})
    assert original == words
    assert len(copies) == 6
    assert [original, *copies] == texts(tmp_path, {"prompt": words}, vary={"spelling": 6})
    for copy in copies:
        assert re.findall(r"\d+", copy) == ["1234", "5678"]
        changed = [(a, b) for a, b in zip(words.split(), copy.split(), strict=True) if a != b]
        assert len(changed) == 1
        assert distance(*changed[0]) == 1
    long = " ".join(["letters"] * 40)
    assert sum(word != "letters" for word in misspelt(long, "seed").split()) == 4, "every tenth"
    assert misspelt("12 + 3 = ?", "seed") == "12 + 3 = ?"


def distance(a: str, b: str) -> int:
    """Count the edits between two words; a swap of neighbours is one (optimal string alignment)."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            best = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, table[i - 2, j - 2] + 1)
            table[i, j] = best
    return table[len(a), len(b)]


@pytest.mark.parametrize(
    ("row", "section", "message"),
    [
        ({"question": "Who?"}, {}, r"q\.jsonl:1: column 'prompt' is missing; the row has question"),
        ({"prompts": "Who?"}, {}, "column 'prompts' is text, but not JSON"),
        ({"prompts": ["Who?", 3]}, {}, "column 'prompts' is int, not text"),
        ({"prompts": ["Who?", "Who?"]}, {}, "gives one prompt only; .* add wordings, or 'vary'"),
        ({"prompt": "1 + 1?"}, {"vary": {"spelling": 3}}, "gives one prompt only"),
        ({"prompt": "Who?", "choices": ["I"]}, {}, "column 'choices' holds 1; a question has 2 to 26"),
        (
            [{"prompts": ["a", "b"]}, {"prompts": ["a", "b"], "choices": ["x", "y"]}],
            {},
            r"q\.jsonl:2: has choices, unlike the rows before; .* are reported apart",
        ),
        (
            {"prompts": ["a", "b"], "choices": ["x", "y"]},
            {"vary": {"templates": ["Q: {prompt}"]}},
            "has no place in the template 'Q: {prompt}'; add {choices}",
        ),
        (
            {"prompts": ["a", "b"]},
            {"vary": {"templates": ["{prompt} {choices}"]}},
            "'choices' is missing, but the template",
        ),
        (
            {"prompts": ["a", "b"]},
            {"num_fewshot": 2, "examples": [{"prompt": "a", "answer": "x"}, {"prompt": "c", "answer": "y"}]},
            r"has 1 examples with other prompts, fewer than num_fewshot \(2\)",
        ),
        (
            {"prompts": ["a", "b"], "choices": ["x", "y"]},
            {"num_fewshot": 1, "examples": [{"prompt": "c", "answer": "y"}]},
            "and the examples differ in having choices",
        ),
        (
            {"prompts": ["a", "b"]},
            {"num_fewshot": 1, "examples": [{"prompt": "c", "choices": ["x", "y"], "answer": 2}]},
            r"examples\.jsonl:1: column 'answer' is 2; it is the number of a choice, 0 to 1",
        ),
    ],
)
def test_errors_in_a_row(tmp_path: Path, row: Any, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, row, **section)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"name": "a", "data": "x"}, {"name": "a", "data": "y"}], "named more than once: a"),
        ([{"name": "a", "data": "x", "num_fewshot": 1}], "num_fewshot and examples go together"),
        ([{"name": "a/b", "data": "x"}], "should match pattern"),
        ([{"name": "a", "data": "x", "vary": {"templates": ["Q:"]}}], "should hold {prompt} once"),
        ([{"name": "a", "data": "x", "vary": {"case": ["lower", "lower"]}}], "named more than once: lower"),
    ],
)
def test_errors_in_a_section(prompts: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        SensitivityStage(models=["base"], prompts=prompts)
