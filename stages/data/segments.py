"""The segments that the tokens of a training row belong to, and their weights. Imports no torch: recipes need it."""

from collections.abc import Mapping
from enum import IntEnum


class Segment(IntEnum):
    """Values of the `segments` column of prepared rows, one per token."""

    PROMPT = 0
    """Words of the user, of tools, and of assistant turns that are not targets."""
    COMPLETION = 1
    """Words that the model should answer, with the end of its turn."""
    SYSTEM = 2
    """Words of a system message."""
    TEMPLATE = 3
    """Text that the chat template writes around the messages: role headers, special tokens, newlines."""
    TEXT = 4
    """Plain text without a prompt."""
    GIVEN = 5
    """A token of a pre-tokenised row, which has its own weight."""


TARGET_SEGMENTS = (Segment.COMPLETION, Segment.TEXT, Segment.GIVEN)
"""Segments that the model should produce; the others are its input."""

MAX_TEMPLATE_SHARE = 0.25
"""Of the weighted tokens. With a template that the model has not seen, more than this make most of the gradient."""


def segment_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each segment, from its number of tokens."""
    total = sum(counts.values())
    return {name: round(count / total, 4) for name, count in counts.items()}


def describe_shares(shares: Mapping[str, float]) -> str:
    """Return a sentence on the shares of the weighted tokens, with a warning about too many of the template."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    text = "the weighted tokens are " + ", ".join(f"{share:.0%} {name}" for name, share in ordered)
    if shares.get("template", 0) > MAX_TEMPLATE_SHARE:
        text += "; the chat template's own can make most of the gradient: set weights.template (docs/weights.md)"
    return text


def weights_by_segment(
    prompt: float, completion: float, system: float | None = None, template: float | None = None
) -> list[float]:
    """Return the weight of each Segment, indexed by its value.

    `system` and `template` default to `prompt`. TEXT weighs as much as a completion; GIVEN weighs 1, which leaves a
    token's own weight unchanged.
    """
    system = prompt if system is None else system
    template = prompt if template is None else template
    return [prompt, completion, system, template, completion, 1.0]
