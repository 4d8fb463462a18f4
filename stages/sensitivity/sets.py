"""Sets of prompts with the same intent: their config, the files they are read from, and generated variants.

Imports no torch, because a recipe's prompts are checked before anything runs.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from stages.base import Config
from stages.data.columns import filled_list, read_as, text
from stages.data.files import BadRow, Record
from stages.evaluation.config import unique

OPEN, CHOICES = "{prompt}", "{prompt}\n{choices}\nAnswer:"
"""The default templates of prompts without and with choices."""
_WORD = re.compile(r"[A-Za-z]{3,}")


class Vary(Config):
    """Variants generated from the first wording of each row, the same in every run and on every machine."""

    spelling: int = Field(default=0, ge=0, le=100)
    """Number of copies with spelling errors: in every tenth word, and in one word at least."""
    case: Annotated[list[Literal["lower", "upper", "title"]], AfterValidator(unique)] = Field(default_factory=list)
    """Copies in another case."""
    templates: Annotated[list[str], AfterValidator(unique)] = Field(default_factory=list)
    """Text around the wording, such as "Q: {prompt}\\nA:"; with choices, {choices} too. The first template applies to
    all wordings; each further one adds a copy of the first wording."""

    @field_validator("templates")
    @classmethod
    def _hold_the_prompt(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{prompt}") != 1:
                raise ValueError(f"{template!r} should hold {{prompt}} once, where the wording goes")
        return templates


class Prompts(Config):
    """A file of sets of prompts with the same intent."""

    name: str = Field(pattern=r"^\w[\w.-]{0,99}$")
    """The name in the report."""
    data: str
    """A file. Rows are {"prompts": [wording, ...]} or {"prompt": wording, "paraphrases": [...]}; multiple-choice rows
    hold "choices": [text, ...] as well."""
    vary: Vary = Vary()
    num_fewshot: int = Field(default=0, ge=0)
    """Worked examples before each prompt: the first of `examples` whose prompt is not in the row."""
    examples: str | None = None
    """A file of rows {"prompt", "answer"}, with "choices" if the prompts have them. An answer that is a number is the
    index of a choice, from 0."""
    max_new_tokens: int = Field(default=30, ge=1)
    """The longest answer, in tokens."""

    @model_validator(mode="after")
    def _few_shots_have_examples(self) -> Self:
        if (self.num_fewshot > 0) != (self.examples is not None):
            raise ValueError("num_fewshot and examples go together; set both or neither")
        return self


@dataclass(frozen=True)
class FewShotPrompt:
    """One prompt, with the worked examples before it."""

    prompt: str
    examples: tuple[tuple[str, str], ...] = ()
    """(prompt, answer) of each."""

    def messages(self, system: str | None) -> list[dict[str, str]]:
        turns = [("system", system)] if system else []
        for prompt, answer in self.examples:
            turns += [("user", prompt), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", self.prompt)]]

    def text(self, system: str | None) -> str:
        """Return the prompt as plain text, with blank lines between the parts."""
        parts = [system] if system else []
        return "\n\n".join([*parts, *(f"{prompt} {answer}" for prompt, answer in self.examples), self.prompt])


@dataclass(frozen=True)
class PromptSet:
    row: int
    """Number of the row in its file, from 1."""
    prompts: tuple[FewShotPrompt, ...]
    """At least two, all different."""


@dataclass(frozen=True)
class _Example:
    prompt: str
    choices: tuple[str, ...]
    answer: str


def read_sets(entry: Prompts, files: Mapping[str, Path], seed: int) -> list[PromptSet]:
    """Read the sets of one entry of a recipe's `prompts`; `files` are named as in SensitivityStage.needs."""
    examples = read_examples(files[f"examples.{entry.name}"]) if entry.examples is not None else ()
    kinds: set[bool] = set()

    def prompt_set(row: Record, number: int) -> PromptSet:
        wordings, choices = _wordings(row), _choices(row)
        kinds.add(bool(choices))
        if len(kinds) > 1:
            raise BadRow(
                None,
                f"has {'choices' if choices else 'no choices'}, unlike the rows before; multiple-choice and open"
                " prompts are reported apart, so use one file and one entry for each",
            )
        return PromptSet(number, _prompts(entry, wordings, choices, examples, f"{seed} {number}"))

    return read_as(files[f"data.{entry.name}"], prompt_set)


def _prompts(
    entry: Prompts, wordings: list[str], choices: tuple[str, ...], examples: tuple[_Example, ...], seed: str
) -> tuple[FewShotPrompt, ...]:
    first_template, *other_templates = entry.vary.templates or [CHOICES if choices else OPEN]
    _check_templates([first_template, *other_templates], bool(choices))
    shots = _shots(entry.num_fewshot, wordings, bool(choices), examples)

    def prompt(wording: str, template: str) -> FewShotPrompt:
        turns = tuple((_render(template, shot.prompt, shot.choices), shot.answer) for shot in shots)
        return FewShotPrompt(_render(template, wording, choices), turns)

    first = wordings[0]
    variants = [*wordings, *(getattr(first, case)() for case in entry.vary.case)]
    variants += [misspelt(first, f"{seed} {copy}") for copy in range(entry.vary.spelling)]
    prompts = [prompt(variant, first_template) for variant in variants]
    prompts += [prompt(first, template) for template in other_templates]
    different = tuple(dict.fromkeys(prompts))
    if len(different) < 2:
        raise BadRow(None, "gives one prompt only; sensitivity is measured over two or more: add wordings, or 'vary'")
    return different


def _check_templates(templates: list[str], has_choices: bool) -> None:
    for template in templates:
        if has_choices and "{choices}" not in template:
            raise BadRow("choices", f"has no place in the template {template!r}; add {{choices}} to it")
        if not has_choices and "{choices}" in template:
            raise BadRow("choices", f"is missing, but the template {template!r} contains {{choices}}")


def _shots(count: int, wordings: list[str], has_choices: bool, examples: tuple[_Example, ...]) -> list[_Example]:
    shots = [example for example in examples if example.prompt not in wordings][:count]
    if len(shots) < count:
        raise BadRow(None, f"has {len(shots)} examples with other prompts, fewer than num_fewshot ({count}); add some")
    if any(bool(shot.choices) != has_choices for shot in shots):
        raise BadRow(None, "and the examples differ in having choices; add them to both or to neither")
    return shots


def _render(template: str, wording: str, choices: tuple[str, ...]) -> str:
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return lines.join(part.replace("{prompt}", wording) for part in template.split("{choices}"))


def _wordings(row: Record) -> list[str]:
    if "prompts" in row:
        return _texts(row, "prompts")
    return [text(row, "prompt"), *(_texts(row, "paraphrases") if row.get("paraphrases") else ())]


def _choices(row: Record) -> tuple[str, ...]:
    if row.get("choices") is None:
        return ()
    choices = _texts(row, "choices")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise BadRow("choices", f"holds {len(choices)}; a question has 2 to {len(ascii_uppercase)}")
    return tuple(choices)


def _texts(row: Record, column: str) -> list[str]:
    return [text({column: value}, column) for value in filled_list(row, column)]


@cache
def read_examples(path: Path) -> tuple[_Example, ...]:
    return tuple(read_as(path, _example))


def _example(row: Record, _: int) -> _Example:
    choices, answer = _choices(row), row.get("answer")
    if not choices or isinstance(answer, str):
        return _Example(text(row, "prompt"), choices, text(row, "answer"))
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadRow("answer", f"is {answer!r}; it is the number of a choice, 0 to {len(choices) - 1}, or text")
    return _Example(text(row, "prompt"), choices, ascii_uppercase[answer])


def misspelt(words: str, seed: str) -> str:
    """Add an error to every tenth word of three letters or more, and to one such word at least."""
    rng = random.Random(seed)  # a str is seeded by its SHA-512, the same on every machine
    spans = [match.span() for match in _WORD.finditer(words)]
    chosen = rng.sample(spans, min(len(spans), max(1, len(spans) // 10)))
    for start, end in sorted(chosen, reverse=True):
        words = words[:start] + _one_error(words[start:end], rng) + words[end:]
    return words


def _one_error(word: str, rng: random.Random) -> str:
    while True:
        i = rng.randrange(len(word) - 1)
        swapped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        dropped, doubled = word[:i] + word[i + 1 :], word[: i + 1] + word[i:]
        replaced = word[:i] + rng.choice(ascii_lowercase) + word[i + 1 :]
        changed = rng.choice((swapped, dropped, doubled, replaced))
        if changed != word:
            return changed
