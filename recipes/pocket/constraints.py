"""Instruction skills: answer a simple request under a constraint that tasks/scoring.py checks."""

import random
from collections.abc import Callable

from skills import Instance
from world import CATEGORIES, QUESTIONS, Content, draw_statement, is_bench, words

START_WORDS = words("Well Surely Indeed Listen Look Today Honestly Friend Now Again")
END_PHRASES = [
    "that is all",
    "my friend",
    "as you know",
    "for sure",
    "I think",
    "I am sure",
    "every day",
    "of course",
]
MIDDLE_WORDS = words("really always surely clearly simply often still usually")

OPENERS = {3: "", 4: "", 5: "Well, ", 6: "I think ", 7: "Well, I think "}
"""Number of words -> the opening that a four-word sentence needs to have as many. Three: a shorter sentence."""


def lower_first(sentence: str) -> str:
    """Return the sentence with a lower-case first letter."""
    return sentence[0].lower() + sentence[1:]


def _content(rng: random.Random) -> Content:
    """Draw a question about the world or a sentence to repeat."""
    return rng.choice(QUESTIONS) if rng.random() < 0.5 else draw_statement(rng)


def _instance(
    family: str,
    content: Content,
    argument: str,
    apply: Callable[[str], str],
    slots: dict[str, str | int],
    rng: random.Random,
) -> Instance:
    """Build an instance whose answer is `apply(sentence)`."""
    ask = {"ask": content.ask, "Ask": content.ask[0].upper() + content.ask[1:]}
    other = rng.choice(content.wrong)
    return Instance(
        family=family,
        bench=is_bench(f"{family} {content.key} {argument}"),
        slots={**ask, **slots},
        answer=apply(content.sentence),
        wrong=(content.sentence, apply(other)),
        accepted=(content.sentence.rstrip(".").lower(), *content.accepted),
        constraint=family,
        argument=argument,
    )


def draw_capitals(rng: random.Random) -> Instance:
    """Everything in capital letters."""
    return _instance("capitals", _content(rng), "", str.upper, {}, rng)


def draw_quotes(rng: random.Random) -> Instance:
    """The answer between double quotes."""
    return _instance("quotes", _content(rng), "", lambda s: f'"{s}"', {}, rng)


def draw_twice(rng: random.Random) -> Instance:
    """The same sentence twice."""
    return _instance("twice", _content(rng), "", lambda s: f"{s} {s}", {}, rng)


def draw_start(rng: random.Random) -> Instance:
    """A required first word."""
    word = rng.choice(START_WORDS)
    return _instance("start", _content(rng), word, lambda s: f"{word}, {lower_first(s)}", {"word": word}, rng)


def draw_end(rng: random.Random) -> Instance:
    """Required last words."""
    phrase = rng.choice(END_PHRASES)
    return _instance("end", _content(rng), phrase, lambda s: f"{s[:-1]}, {phrase}.", {"phrase": phrase}, rng)


def draw_include(rng: random.Random) -> Instance:
    """A required word anywhere in the answer."""
    word, content = rng.choice(MIDDLE_WORDS), _content(rng)
    verb = " says " if " says " in content.sentence else " is "
    new = f" {word} says " if verb == " says " else f" is {word} "
    return _instance("include", content, word, lambda s: s.replace(verb, new, 1), {"word": word}, rng)


def _with_words(content: Content, count: int, value: str) -> str:
    """Say the answer in 3 to 7 words."""
    if count == 3:
        return f"{'It says' if ' says ' in content.sentence else 'It is'} {value}."
    verb = "says" if " says " in content.sentence else "is"
    sentence = f"The {content.subject} {verb} {value}."
    return OPENERS[count] + lower_first(sentence) if OPENERS[count] else sentence


def draw_words(rng: random.Random) -> Instance:
    """An exact number of words."""
    content = rng.choice([q for q in QUESTIONS if not q.ask.startswith("where")])
    count = rng.choice(sorted(OPENERS))
    other = rng.choice([n for n in sorted(OPENERS) if n != count])
    inst = _instance("words", content, str(count), lambda s: s, {"n": count}, rng)
    return Instance(
        family="words",
        bench=inst.bench,
        slots=inst.slots,
        answer=_with_words(content, count, content.value),
        wrong=(
            _with_words(content, other, content.value),
            _with_words(content, count, rng.choice(content.rivals)),
        ),
        accepted=(content.value,),
        constraint="words",
        argument=str(count),
        rivals=content.rivals,
    )


def draw_list(rng: random.Random) -> Instance:
    """Three members of a group, separated by commas, with a required first member."""
    group = rng.choice(sorted(CATEGORIES))
    members = CATEGORIES[group]
    alien = CATEGORIES[rng.choice([g for g in sorted(CATEGORIES) if g != group])]
    first, second, third, fourth = rng.sample(members, 4)
    stranger = rng.choice([w for w in alien if w not in members])
    return Instance(
        family="list",
        bench=is_bench(f"list {group} {first}"),
        slots={"group": group, "first": first},
        answer=f"{first}, {second}, {third}",
        wrong=(f"{first}, {second}, {third}, {fourth}", f"{first}, {stranger}, {third}"),
        accepted=tuple(members),
        constraint="list",
        argument=first,
    )


CONSTRAINTS: dict[str, Callable[[random.Random], Instance]] = {
    "capitals": draw_capitals,
    "words": draw_words,
    "start": draw_start,
    "end": draw_end,
    "include": draw_include,
    "quotes": draw_quotes,
    "twice": draw_twice,
    "list": draw_list,
}
