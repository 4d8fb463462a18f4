"""What each token of a training row is, and what it weighs. Light: imports no torch, for recipes are read by it."""

from __future__ import annotations

from enum import IntEnum


class Segment(IntEnum):
    """Values of the `segments` column of prepared rows: one for each token."""

    PROMPT = 0
    """What the model is given: the words of the user, of tools, of assistant turns that are not to be learnt."""
    COMPLETION = 1
    """What the model shall answer, with the end of its turn."""
    SYSTEM = 2
    """The words of a system message."""
    TEMPLATE = 3
    """What the chat template writes around the messages: role headers, special tokens, line ends."""
    TEXT = 4
    """Plain text without a prompt."""
    GIVEN = 5
    """A token of a pre-tokenised row, whose weight the row itself gives."""


LEARNT = (Segment.COMPLETION, Segment.TEXT, Segment.GIVEN)
"""What the model shall answer, as against what it is given."""


def weight_table(
    prompt: float, completion: float, system: float | None = None, template: float | None = None
) -> list[float]:
    """The weight of each Segment, by its value. `system` and `template` default to `prompt`; plain text weighs as a
    completion; a given weight stands as it is."""
    return [
        prompt,
        completion,
        prompt if system is None else system,
        prompt if template is None else template,
        completion,
        1.0,
    ]
