"""Files -> sets of prompts with the same intent, further wordings made where the recipe asks for them.

Light by intent: a recipe's prompts are checked before anything runs, so torch is not imported here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any

from stages.data.columns import BadRow, filled_list, read_as, text
from stages.data.files import Record

if TYPE_CHECKING:
    from stages.sensitivity.config import Prompts

CASES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "title": str.title}
OPEN, CHOICES = "{prompt}", "{prompt}\n{choices}\nAnswer:"
"""The templates of prompts that are asked as they stand, and of those with choices."""
WORDS_PER_ERROR = 10
_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True)
class Asked:
    """One prompt, with the worked examples that stand before it."""

    prompt: str
    examples: tuple[tuple[str, str], ...] = ()
    """(prompt, answer) of each."""

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """The conversation that a chat template takes."""
        said = [("system", system)] if system else []
        for prompt, answer in self.examples:
            said += [("user", prompt), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in [*said, ("user", self.prompt)]]

    def text(self, system: str | None) -> str:
        """The same as plain text, blank lines between."""
        parts = [system] if system else []
        return "\n\n".join([*parts, *(f"{prompt} {answer}" for prompt, answer in self.examples), self.prompt])


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one intent: what one index of sensitivity is measured over."""

    row: int
    """Where it stands in its file, from 1."""
    asked: tuple[Asked, ...]
    """At least two, all different."""


@dataclass(frozen=True)
class _Example:
    prompt: str
    choices: tuple[str, ...]
    answer: str


def read_sets(prompts: Prompts, files: Mapping[str, Path], seed: int) -> list[PromptSet]:
    """The sets of one entry of a recipe's `prompts`.

    Args:
        prompts: the entry.
        files: its files, under the names that SensitivityStage.needs gives them.
        seed: of the spelling errors.

    Raises:
        UserError: a row that cannot be used, with its file and line.
    """
    examples = read_examples(files[f"examples.{prompts.name}"]) if prompts.examples is not None else ()
    kinds: set[bool] = set()

    def prompt_set(row: Record, number: int) -> PromptSet:
        wordings, choices = _wordings(row), _choices(row)
        kinds.add(bool(choices))
        if len(kinds) > 1:
            raise BadRow(
                None,
                f"has {'choices' if choices else 'no choices'}, unlike the rows before; multiple-choice and open"
                " prompts are reported apart, so give each a file and an entry of its own",
            )
        return PromptSet(number, _asked(prompts, wordings, choices, examples, f"{seed} {number}"))

    return read_as(files[f"data.{prompts.name}"], prompt_set)


def _asked(
    prompts: Prompts, wordings: list[str], choices: tuple[str, ...], examples: tuple[_Example, ...], seed: str
) -> tuple[Asked, ...]:
    given = prompts.vary.templates or [CHOICES if choices else OPEN]
    for template in given:
        if choices and "{choices}" not in template:
            raise BadRow("choices", f"has no place in the template {template!r}; add {{choices}} to it")
        if not choices and "{choices}" in template:
            raise BadRow("choices", f"is missing, which the template {template!r} asks for")
    shots = [example for example in examples if example.prompt not in wordings][: prompts.num_fewshot]
    if len(shots) < prompts.num_fewshot:
        raise BadRow(None, f"finds {len(shots)} examples that it does not ask for itself, not {prompts.num_fewshot}")
    if any(bool(shot.choices) != bool(choices) for shot in shots):
        raise BadRow(None, "and the examples differ in having choices; give either both or neither")

    def ask(words: str, template: str) -> Asked:
        turns = tuple((_render(template, shot.prompt, shot.choices), shot.answer) for shot in shots)
        return Asked(_render(template, words, choices), turns)

    all_wordings = [*wordings, *(CASES[case](wordings[0]) for case in prompts.vary.case)]
    all_wordings += [misspelt(wordings[0], f"{seed} {copy}") for copy in range(prompts.vary.spelling)]
    asked = [ask(words, given[0]) for words in all_wordings] + [ask(wordings[0], other) for other in given[1:]]
    different = tuple(dict.fromkeys(asked))
    if len(different) < 2:
        raise BadRow(None, "gives one prompt only; sensitivity is measured over two or more: add wordings, or 'vary'")
    return different


def _render(template: str, words: str, choices: tuple[str, ...]) -> str:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return listed.join(part.replace("{prompt}", words) for part in template.split("{choices}"))


def _wordings(row: Record) -> list[str]:
    if "prompts" in row:
        return [_text(value, "prompts") for value in filled_list(row, "prompts")]
    further = filled_list(row, "paraphrases") if row.get("paraphrases") else []
    return [text(row, "prompt"), *(_text(value, "paraphrases") for value in further)]


def _choices(row: Record) -> tuple[str, ...]:
    if row.get("choices") is None:
        return ()
    choices = tuple(_text(value, "choices") for value in filled_list(row, "choices"))
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise BadRow("choices", f"holds {len(choices)}; a question has 2 to {len(ascii_uppercase)}")
    return choices


def _text(value: Any, column: str) -> str:
    return text({column: value}, column)


@cache
def read_examples(path: Path) -> tuple[_Example, ...]:
    """The worked examples in a file. Raises UserError."""
    return tuple(read_as(path, _example))


def _example(row: Record, _: int) -> _Example:
    choices = _choices(row)
    return _Example(text(row, "prompt"), choices, _answer(row, choices))


def _answer(row: Record, choices: tuple[str, ...]) -> str:
    answer = row.get("answer")
    if not choices or isinstance(answer, str):
        return text(row, "answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadRow("answer", f"is {answer!r}; it is the number of a choice, 0 to {len(choices) - 1}, or text")
    return ascii_uppercase[answer]


def misspelt(words: str, seed: str) -> str:
    """`words` with an error in every tenth word of at least three letters, and in one at least: two letters swapped,
    or one left out, doubled or replaced. Numbers and marks stay; so do words without such a word."""
    chance = random.Random(seed)  # a str seeds by its SHA-512, the same on every machine
    places = [(found.start(), found.end()) for found in _WORD.finditer(words)]
    chosen = chance.sample(places, min(len(places), max(1, len(places) // WORDS_PER_ERROR)))
    for start, end in sorted(chosen, reverse=True):
        words = words[:start] + _one_error(words[start:end], chance) + words[end:]
    return words


def _one_error(word: str, chance: random.Random) -> str:
    def made() -> Iterator[str]:
        while True:
            i = chance.randrange(len(word) - 1)
            yield chance.choice(
                (
                    word[:i] + word[i + 1] + word[i] + word[i + 2 :],
                    word[:i] + word[i + 1 :],
                    word[: i + 1] + word[i:],
                    word[:i] + chance.choice(ascii_lowercase) + word[i + 1 :],
                )
            )

    return next(other for other in made() if other != word)
