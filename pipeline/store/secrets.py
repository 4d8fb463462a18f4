"""Secrets in environment variables, which must never be written to a file or the console."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"(^|_)(TOKEN|SECRETS?|PASS|PASSWORD|PASSWD|PASSPHRASE|KEY|APIKEY|CREDENTIALS?|PAT)(_|$)", re.I)


def secret_variables() -> dict[str, str]:
    """Return variable -> value where the name marks a secret, as HF_TOKEN does; a short value could be any word."""
    return {name: value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= 8}


def mask_secrets(text: str) -> str:
    """Replace every secret in `text` by `***`."""
    for value in sorted(secret_variables().values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def mask_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if (masked := mask_secrets(text)) != text:
        path.write_text(masked, encoding="utf-8")
