"""The libraries' own help texts for their options, shown in the recipe schema and reference.

They are in option_help.json. Reading, planning and running a recipe do not need them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

HELP_FILE = Path(__file__).with_name("option_help.json")

DOCS = json.loads(Path(__file__).with_name("library_docs.json").read_text())
STAGE_NOTES: dict[str, str] = DOCS["stage_notes"]
"""Fields of TRL's configs whose default or meaning differs in a stage (stages.training.loop.arguments) -> how."""


class Help(NamedTuple):
    """A library's default and help text of one option."""

    default: Any
    """None if the library has no default or computes it."""
    text: str
    """First sentence of the help; empty if there is none."""


@cache
def option_help(name: str) -> dict[str, Help]:
    """Return option -> help of a class or command in options.json."""
    texts = {key: Help(*entry) for key, entry in json.loads(HELP_FILE.read_text())[name].items()}
    for key, note in STAGE_NOTES.items() if name in ("SFTConfig", "DPOConfig") else ():
        texts[key] = Help(None, f"{texts[key].text} {note}")
    return texts
