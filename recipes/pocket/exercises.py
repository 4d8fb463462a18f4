"""Instruction, preference and benchmark rows, built from the skills and their wordings."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from constraints import CONSTRAINTS
from skills import BENCHMARKS, SKILLS, WORDINGS, Instance
from wordings import SEEN
from world import SEED

FAMILIES: dict[str, Callable[[random.Random], Instance]] = {**SKILLS, **CONSTRAINTS}

TRAIN, EVAL, PREFERENCES = 138, 9, 55
"""Rows per family in the instruction data, its evaluation split and the preference data."""
BENCH = {"knowledge": 80, "reasoning": 60, "instructions": 60}
"""Items per family in its benchmark, half of them in held-out wordings."""
REWORDED = 8
"""Items per family that appear in every held-out wording, to measure prompt sensitivity."""


@dataclass(frozen=True)
class Exercise:
    """An instance in one of its wordings."""

    instance: Instance
    wording: int
    prompt: str


@dataclass(frozen=True)
class Exercises:
    """All exercises, in four groups that share no prompt."""

    train: list[Exercise]
    eval: list[Exercise]
    preferences: list[Exercise]
    bench: list[Exercise]


class _Drawer:
    """Draws exercises whose prompts are all different."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._prompts: set[str] = set()
        self._facts: set[str] = set()

    def draw(self, family: str, count: int, wordings: range, bench: bool) -> list[Exercise]:
        """Draw exercises of one family with the wordings in turn. A benchmark contains each fact once."""
        exercises: list[Exercise] = []
        for _ in range(200_000):
            if len(exercises) == count:
                return exercises
            instance = FAMILIES[family](self._rng)
            if instance.bench != bench:
                continue
            wording = wordings[len(exercises) % len(wordings)]
            prompt = instance.ask(wording)
            if bench and BENCHMARKS[family] == "knowledge":
                if instance.answer in self._facts:
                    continue
                self._facts.add(instance.answer)
            if prompt not in self._prompts:
                self._prompts.add(prompt)
                exercises.append(Exercise(instance, wording, prompt))
        raise ValueError(f"family {family} has fewer than {count} different prompts")


UNSEEN = range(SEEN, len(WORDINGS["sum"]))
"""The wordings held out of all training data."""


def exercises() -> Exercises:
    """Draw all exercises."""
    rng = random.Random(SEED + 1)
    drawer = _Drawer(rng)
    groups = Exercises([], [], [], [])
    seen = range(SEEN)
    for family in FAMILIES:
        half = BENCH[BENCHMARKS[family]] // 2
        groups.bench.extend(drawer.draw(family, half, seen, bench=True))
        groups.bench.extend(drawer.draw(family, half, UNSEEN, bench=True))
        groups.train.extend(drawer.draw(family, TRAIN, seen, bench=False))
        groups.eval.extend(drawer.draw(family, EVAL, seen, bench=False))
        groups.preferences.extend(drawer.draw(family, PREFERENCES, seen, bench=False))
    for group in (groups.train, groups.eval, groups.preferences):
        rng.shuffle(group)
    return groups


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def instruction_rows(drawn: list[Exercise]) -> list[dict[str, Any]]:
    """Return rows of prompt and completion."""
    return [
        {
            "prompt": _message("user", e.prompt),
            "completion": _message("assistant", e.instance.answer),
            "family": e.instance.family,
            "wording": e.wording,
        }
        for e in drawn
    ]


def preference_rows(drawn: list[Exercise]) -> list[dict[str, Any]]:
    """Return rows of prompt, chosen and rejected answer. The rejected answers cycle through the kinds of error."""
    return [
        {
            "prompt": _message("user", e.prompt),
            "chosen": _message("assistant", e.instance.answer),
            "rejected": _message("assistant", e.instance.wrong[i % len(e.instance.wrong)]),
            "family": e.instance.family,
            "wording": e.wording,
        }
        for i, e in enumerate(drawn)
    ]


def bench_rows(drawn: list[Exercise], benchmark: str) -> list[dict[str, Any]]:
    """Return the items of one benchmark."""
    rng = random.Random(SEED + 2)
    make = {"knowledge": _knowledge, "reasoning": _reasoning, "instructions": _instructions}[benchmark]
    return [
        {
            "question": e.prompt,
            **make(e.instance, rng),
            "family": e.instance.family,
            "wording": e.wording,
            "held_out": e.wording >= SEEN,
        }
        for e in drawn
        if BENCHMARKS[e.instance.family] == benchmark
    ]


def reworded_rows(drawn: list[Exercise]) -> list[dict[str, Any]]:
    """Return the first REWORDED held-out items of each family, in all held-out wordings."""
    held_out = [e.instance for e in drawn if e.wording in UNSEEN]
    first = [instance for family in FAMILIES for instance in [i for i in held_out if i.family == family][:REWORDED]]
    return [{"prompts": [i.ask(wording) for wording in UNSEEN], "family": i.family} for i in first]


def _knowledge(instance: Instance, rng: random.Random) -> dict[str, Any]:
    choices = [f" {answer}" for answer in (instance.answer, *instance.wrong)]
    rng.shuffle(choices)
    return {"choices": choices, "target": choices.index(f" {instance.answer}")}


def _reasoning(instance: Instance, _: random.Random) -> dict[str, Any]:
    return {"answer": instance.answer, "accepted": list(instance.accepted)}


def _instructions(instance: Instance, _: random.Random) -> dict[str, Any]:
    return {
        "answer": instance.answer,
        "constraint": instance.constraint,
        "argument": instance.argument,
        "accepted": list(instance.accepted),
        "rivals": list(instance.rivals),
    }
