"""Values of the environment that are to be written nowhere, known by the names of their variables."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"(^|_)(TOKEN|SECRETS?|PASS|PASSWORD|PASSWD|PASSPHRASE|KEY|APIKEY|CREDENTIALS?|PAT)(_|$)", re.I)
_SHORTEST = 8
"""Characters of a secret; a shorter value could be any word."""


def secrets() -> dict[str, str]:
    """Variable -> value, for those that hold a secret by their name: HF_TOKEN, OPENAI_API_KEY, ..."""
    return {name: value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _SHORTEST}


def masked(text: str) -> str:
    """`text` with `***` for every secret in it."""
    for value in sorted(secrets().values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def mask_file(path: Path) -> None:
    """The same for what is in a text file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if (safe := masked(text)) != text:
        path.write_text(safe, encoding="utf-8")
