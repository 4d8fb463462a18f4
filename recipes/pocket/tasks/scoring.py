"""How the pocket benchmarks judge an answer. lm-eval calls the `score_*` functions with one document each.

Every score comes twice: over all items, and, under a name that ends in `held_out`, over the items whose
wording no training data has seen. This file imports nothing but the standard library.
"""

import re
from collections.abc import Sequence
from typing import Any


def normalise(text: str) -> str:
    """Lower-case the text, drop punctuation and surplus spaces."""
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", text.lower()).split())


def _with_held_out(doc: dict[str, Any], scores: dict[str, float]) -> dict[str, float]:
    """Repeat the scores under their `_held_out` names where the document's wording is held out."""
    if doc["held_out"]:
        scores = scores | {f"{name}_held_out": value for name, value in scores.items()}
    return scores


def score_knowledge(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Score 1 when the right choice is the likeliest of the four."""
    likelihoods = [float(result[0]) for result in results]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return _with_held_out(doc, {"acc": float(best == doc["target"])})


def score_reasoning(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score 1 when the normalised answer equals one of the few accepted answers.

    Accepted are the reference sentence, the bare value, and a few other short ways to state it. A list of
    several values, or a sentence that misquotes the question, equals none of them.
    """
    said = normalise(results[0])
    right = {normalise(text) for text in [doc["answer"], *doc["accepted"]]}
    return _with_held_out(doc, {"exact_match": float(said in right)})


def score_instructions(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score `compliant` when the constraint is kept, `correct` when what is said is right as well."""
    compliant, correct = judge(
        results[0], doc["constraint"], doc["argument"], list(doc["accepted"]), list(doc["rivals"])
    )
    return _with_held_out(doc, {"correct": float(correct), "compliant": float(compliant)})


def judge(response: str, constraint: str, argument: str, accepted: list[str], rivals: list[str]) -> tuple[bool, bool]:
    """Return (compliant, correct) for a response.

    Args:
        response: What the model said.
        constraint: One of the keys of `CHECKS`, or "words" or "list".
        argument: The word, words or number that the constraint names; may be empty.
        accepted: Right answers without the constraint, in lower case without punctuation; for "words" the one
            word that carries the answer; for "list" all members of the group.
        rivals: For "words": the words that would carry a wrong answer.
    """
    text = response.strip()
    if constraint == "words":
        said = normalise(text).split()
        compliant = len(said) == int(argument)
        return compliant, compliant and said.count(accepted[0]) == 1 and not set(said) & set(rivals)
    if constraint == "list":
        items = [normalise(item) for item in text.split(",")]
        compliant = len(set(items)) == len(items) == 3 and items[0] == argument and all(items)
        return compliant, compliant and set(items) <= set(accepted)
    rest = CHECKS[constraint](text, argument)
    return rest is not None, rest is not None and rest in accepted


def _capitals(text: str, _: str) -> str | None:
    return normalise(text) if any(c.isalpha() for c in text) and text == text.upper() else None


def _quotes(text: str, _: str) -> str | None:
    inside = text[1:-1]
    kept = len(text) > 2 and text[0] == text[-1] == '"' and '"' not in inside and bool(normalise(inside))
    return normalise(inside) if kept else None


def _twice(text: str, _: str) -> str | None:
    words = normalise(text).split()
    half = len(words) // 2
    return " ".join(words[:half]) if half and words[:half] == words[half:] else None


def _start(text: str, word: str) -> str | None:
    words = normalise(text).split()
    return " ".join(words[1:]) if len(words) > 1 and words[0] == word.lower() else None


def _end(text: str, phrase: str) -> str | None:
    said, tail = normalise(text), f" {normalise(phrase)}"
    return said.removesuffix(tail) if said.endswith(tail) else None


def _include(text: str, word: str) -> str | None:
    words = normalise(text).split()
    if word.lower() not in words or len(words) < 2:
        return None
    words.remove(word.lower())
    return " ".join(words)


CHECKS = {
    "capitals": _capitals,
    "quotes": _quotes,
    "twice": _twice,
    "start": _start,
    "end": _end,
    "include": _include,
}
"""Each check returns what is left of a compliant answer once the constraint is taken off, else None."""
