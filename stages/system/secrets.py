"""Secrets in environment variables, which must never be written to a file or the console."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

_SECRET_NAME = re.compile(
    r"(^|_)(PASS|KEY|KEYS|PAT|AUTH)(_|$)|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|CREDENTIAL", re.I
)
_SHORTEST = 8
"""A shorter value could be any word."""


def secret_values() -> Iterator[tuple[str, str]]:
    """Yield variables and their secrets: a value whose name marks it, as HF_TOKEN does, or what a URL has before @."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield name, value
        elif "://" in value and "@" in value:
            user, separator, password = urlsplit(value).netloc.rpartition("@")[0].partition(":")
            for part in {password, unquote(password)} if separator else {user}:
                if len(part) >= _SHORTEST:
                    yield name, part
            if separator:
                yield name, f"{user}:{password}@"


def mask_secrets(text: str) -> str:
    """Replace every secret in `text` by `***`."""
    for value in sorted({value for _, value in secret_values()}, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
