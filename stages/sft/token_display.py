"""Token ids -> what they look like, one by one: half letters, white space and special tokens too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
"""How white space is shown."""
TIMES = "\u00d7"
"""Before a weight."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """The text of every token of a fast tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        self._bytes = _byte_alphabet() if "ByteLevel" in decoder else None
        self._falls_back = "ByteFallback" in decoder

    def special(self, id: int) -> bool:
        """Whether the token is one of the tokenizer's special tokens."""
        return id in self._tokenizer.all_special_ids or (id in self._added and self._added[id].special)

    def text(self, id: int) -> str:
        """What the token adds to a text; bytes that make no whole letter as `<0xC3>`."""
        if id in self._added:
            return self._added[id].content
        token = self._tokenizer.backend_tokenizer.id_to_token(id)
        if token is None:
            return f"<id {id}>"
        if self._bytes is not None and all(letter in self._bytes for letter in token):
            return "".join(_letters(bytes(self._bytes[letter] for letter in token)))
        if self._falls_back and (byte := _BYTE.fullmatch(token)):
            return "".join(_letters(bytes.fromhex(byte[1])))
        return token.replace("▁", " ")


def visible(text: str, spaces: bool = True) -> str:
    """`text` with white space shown by signs, and what cannot be seen or would steer a terminal by its number."""
    signs = SIGNS if spaces else {" ": " "}
    return "".join(signs.get(one) or (one if one.isprintable() else f"<U+{ord(one):04X}>") for one in text)


def _letters(raw: bytes) -> Iterator[str]:
    """The letters that `raw` holds whole, and its other bytes as `<0xC3>`."""
    while raw:
        try:
            yield raw.decode()
            return
        except UnicodeDecodeError as error:
            yield raw[: error.start].decode()
            yield "".join(f"<0x{byte:02X}>" for byte in raw[error.start : error.end])
            raw = raw[error.end :]


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte, as byte-level tokenizers write their tokens (GPT-2): printable Latin-1 stands for itself, the
    other bytes for the letters from 256 on, in order."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + number): byte for number, byte in enumerate(others)}
