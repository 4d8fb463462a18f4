"""The segments that the tokens of a training row belong to, and their weights. Imports no torch: recipes need it."""

from __future__ import annotations

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
