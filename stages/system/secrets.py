"""Secrets in environment variables, which must never be written to a file or the console."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

_SECRET_NAME = re.compile(
    r"(^|_)(KEYS?|PAT|AUTH)\d*(_|$)|_PWD\d*(_|$)|(?<!COM)(?<!BY)PASS\d*(_|$)|PASSWORD|PASSWD|PASSPHRASE|TOKEN(?!IZ)|SECRET"
    r"|BEARER|CREDENTIAL|(API|ACCESS|PRIVATE|SECRET|SIGNING|MASTER)_?KEY",
    re.I,
)
_USER_INFO = re.compile(r"://([^/?#@\s]*)@")
_SHORTEST = 8
"""A shorter value could be any word."""


def secret_values() -> Iterator[tuple[str, str]]:
    """Yield variables and their secrets: a value whose name marks it, as HF_TOKEN does, or what a URL has before @."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield name, value
        for user_info in _USER_INFO.findall(value):
            for part in {user_info, *user_info.split(":", 1)}:
                for text in {part, unquote(part)}:
                    if len(text) >= _SHORTEST:
                        yield name, text


def mask_secrets(text: str) -> str:
    """Replace every secret in `text` by `***`."""
    for value in sorted({value for _, value in secret_values()}, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
