"""Question answering skills: knowledge of people and small reasoning puzzles.

A skill draws instances from the world. exercises.py chooses their wordings.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from wordings import INSTRUCTIONS, KNOWLEDGE, REASONING
from world import (
    ATTRIBUTES,
    CATEGORIES,
    FACT_SENTENCES,
    MOVABLES,
    OPPOSITES,
    PEOPLE,
    ROOMS,
    SIZES,
    is_bench,
    is_bench_fact,
    is_bench_pair,
)

BENCHMARKS = {
    **dict.fromkeys(KNOWLEDGE, "knowledge"),
    **dict.fromkeys(REASONING, "reasoning"),
    **dict.fromkeys(INSTRUCTIONS, "instructions"),
}
"""Family -> its benchmark."""
WORDINGS = {**KNOWLEDGE, **REASONING, **INSTRUCTIONS}


@dataclass(frozen=True)
class Instance:
    """One exercise: the values of a wording's slots, the right answer, and the data for judging."""

    family: str
    bench: bool
    """Whether it is reserved for the benchmark. If not, it may be in training data."""
    slots: dict[str, str | int]
    answer: str
    wrong: tuple[str, ...]
    """Answers that fail: a wrong value, or a violated constraint."""
    accepted: tuple[str, ...] = ()
    """Right answers besides `answer`, in lower case without punctuation."""
    constraint: str = ""
    argument: str = ""
    rivals: tuple[str, ...] = field(default=())

    def ask(self, wording: int) -> str:
        """Return the prompt in one of the family's wordings."""
        return WORDINGS[self.family][wording].format(**self.slots)


Draw = Callable[[random.Random], Instance]


def fact(attribute: str) -> Draw:
    """Return the skill that asks for one attribute of a person."""

    def draw(rng: random.Random) -> Instance:
        person = rng.choice(PEOPLE)
        value = person.facts[attribute]
        say = FACT_SENTENCES[attribute]
        others = rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3)
        wrong = tuple(say.format(name=person.name, value=v) for v in others)
        bench = is_bench_fact(person, attribute)
        slots: dict[str, str | int] = {"name": person.name}
        return Instance(attribute, bench, slots, say.format(name=person.name, value=value), wrong, (value,))

    return draw


def _close_numbers(rng: random.Random, right: int, operands: tuple[int, ...]) -> list[int]:
    """Draw three wrong numbers close to the right one."""
    return rng.sample([n for n in range(max(1, right - 10), right + 11) if n != right and n not in operands], 3)


def draw_sum(rng: random.Random) -> Instance:
    """Draw two numbers to add; the second has one digit."""
    a, b = rng.randint(2, 60), rng.randint(2, 9)
    total = a + b
    wrong = tuple(f"{a} plus {b} is {n}." for n in _close_numbers(rng, total, (a, b)))
    accepted = (str(total), f"{b} plus {a} is {total}", f"the sum of {a} and {b} is {total}")
    key = f"sum {min(a, b)} {max(a, b)}"
    return Instance("sum", is_bench(key), {"a": a, "b": b}, f"{a} plus {b} is {total}.", wrong, accepted)


def draw_difference(rng: random.Random) -> Instance:
    """Draw two numbers to subtract; the second has one digit and the result is positive."""
    b, rest = rng.randint(2, 9), rng.randint(2, 60)
    a = b + rest
    wrong = tuple(f"{a} minus {b} is {n}." for n in _close_numbers(rng, rest, (a, b)))
    accepted = (str(rest), f"the difference between {a} and {b} is {rest}")
    key = f"difference {a} {b}"
    return Instance("difference", is_bench(key), {"a": a, "b": b}, f"{a} minus {b} is {rest}.", wrong, accepted)


def draw_count(rng: random.Random) -> Instance:
    """Draw a list of up to seven words in which one word appears 2 to 5 times."""
    group = rng.choice(["fruits", "animals", "toys"])
    word, *others = rng.sample(CATEGORIES[group], 3)
    times = rng.randint(2, 5)
    items = [word] * times + [rng.choice(others) for _ in range(rng.randint(1, 3))]
    rng.shuffle(items)
    slots: dict[str, str | int] = {"word": word, "items": ", ".join(items)}
    say = "The word {} appears {} times."
    wrong = tuple(say.format(word, n) for n in range(1, 7) if n != times)
    accepted = (str(times), f"{times} times", f"{word} appears {times} times")
    return Instance("count", is_bench(f"count {items}"), slots, say.format(word, times), wrong, accepted)


def extreme(family: str) -> Draw:
    """Return the skill that asks for the biggest or the smallest of three animals."""

    def draw(rng: random.Random) -> Instance:
        trio = rng.sample(SIZES, 3)
        order = sorted(trio, key=SIZES.index)
        right = order[-1] if family == "biggest" else order[0]
        say = f"The {family} of the three is the {{}}."
        wrong = tuple(say.format(a) for a in order if a != right)
        slots: dict[str, str | int] = dict(zip("xyz", trio, strict=True))
        accepted = (right, f"the {right}", f"the {right} is the {family}", f"the {family} is the {right}")
        return Instance(family, is_bench(f"trio {order}"), slots, say.format(right), wrong, accepted)

    return draw


def draw_move(rng: random.Random) -> Instance:
    """Draw a thing that somebody moves from one room to another."""
    thing, name = rng.choice(MOVABLES), rng.choice(PEOPLE).name
    start, end, other = rng.sample(ROOMS, 3)
    say = f"The {thing} is now in the {{}}."
    slots: dict[str, str | int] = {"thing": thing, "name": name, "start": start, "end": end}
    wrong = (say.format(start), say.format(other))
    accepted = (end, f"the {end}", f"in the {end}", f"the {thing} is in the {end}", f"it is in the {end}")
    key = f"move {thing} {start} {end}"
    return Instance("move", is_bench(key), slots, say.format(end), wrong, accepted)


def draw_compare(rng: random.Random) -> Instance:
    """Draw two people with ages invented for the question."""
    p, q = (person.name for person in rng.sample(PEOPLE, 2))
    a, b = rng.sample(range(11, 90), 2)
    old, young = (p, q) if a > b else (q, p)
    slots: dict[str, str | int] = {"p": p, "q": q, "a": a, "b": b}
    accepted = (old.lower(), f"{old.lower()} is older", f"the older one is {old.lower()}")
    key = f"compare {min(a, b)} {max(a, b)}"
    wrong = (f"{young} is older than {old}.",)
    return Instance("compare", is_bench(key), slots, f"{old} is older than {young}.", wrong, accepted)


def draw_opposite(rng: random.Random) -> Instance:
    """Draw a word that has an opposite."""
    index = rng.randrange(len(OPPOSITES))
    word, other = rng.sample(OPPOSITES[index], 2)
    say = f"The opposite of {word} is {{}}."
    away = [w for i, pair in enumerate(OPPOSITES) if i != index for w in pair]
    wrong = tuple(say.format(w) for w in rng.sample(away, 3))
    accepted = (other, f"the opposite is {other}")
    return Instance("opposite", is_bench_pair(index), {"word": word}, say.format(other), wrong, accepted)


SKILLS: dict[str, Draw] = {
    **{attribute: fact(attribute) for attribute in ATTRIBUTES},
    "sum": draw_sum,
    "difference": draw_difference,
    "count": draw_count,
    "biggest": extreme("biggest"),
    "smallest": extreme("smallest"),
    "move": draw_move,
    "compare": draw_compare,
    "opposite": draw_opposite,
}
