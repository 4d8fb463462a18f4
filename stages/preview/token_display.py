"""Previewed rows as tokens that a person can read: partial characters, white space and special tokens are visible.

On a terminal, segments are background colours, or labels and marks if there are no colours.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions
from rich.text import Text

from stages.data.segments import Segment, segment_shares
from stages.system.terminal_text import safe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENT_NAMES = [segment.name.lower() for segment in Segment]
WHITE_SPACE_SYMBOLS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
TIMES = "\u00d7"  # precedes a weight
COMPLETIONS = ("completion", "chosen", "rejected")
"""Segments with a heading; the last two of a preference pair."""
COLOURS = {
    "prompt": ("#9ccbf5", "#c3e0fa", "#4a86b8", "#74a5cc"),
    "completion": ("#ffb454", "#ffd59b", "#b8732a", "#cf9556"),
    "system": ("#d3a4e3", "#e7cbf0", "#96629f", "#b08ab8"),
    "template": ("#c4c9d0", "#dfe2e7", "#7a828c", "#989fa8"),
    "text": ("#7ed6b1", "#b4e8d2", "#3a9470", "#68b092"),
    "given": ("#efdc66", "#f7eeab", "#94851f", "#b3a551"),
    "chosen": ("#7ed6b1", "#b4e8d2", "#3a9470", "#68b092"),
    "rejected": ("#f2a58e", "#f9cec1", "#b4543a", "#cc8570"),
}
"""Segment -> two alternating backgrounds of tokens with weight, two foregrounds of tokens without. The colour-blind can
tell the hues apart (Okabe and Ito)."""
MAX_WIDTH = 120
SEPARATOR = "¦"  # between tokens if there are no colours

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    id: int
    text: str
    """Decoded; bytes that are part of a character look like `<0xC3>`."""
    segment: str
    """The name of its Segment in lower case; of a pair's completions `chosen` or `rejected`."""
    weight: float
    """Segment weight times weight multiplier, of a pair 1 or -1; 0 for a row's first token, which nothing predicts."""
    special: bool
    label: str
    """Segment and weight, in words."""

    @property
    def lines(self) -> list[str]:
        """The text with visible white space, split after each newline."""
        text = visible(self.text) or f"<id {self.id}>"
        return [line for line in text.replace("↵", "↵\n").split("\n") if line]


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens with the same label."""

    tokens: list[Token]
    position: int
    """Index of the first token in the row."""
    heading: str
    """The segment, if a completion starts here after another segment."""

    @property
    def first(self) -> Token:
        """Any token of the run; all share segment and label."""
        return self.tokens[0]


@dataclass(frozen=True)
class PreviewedRow:
    """One row as the trainer sees it."""

    row: int
    """Number in the file, from 1."""
    tokens: list[Token]
    truncated: int
    """Tokens beyond max_length."""
    boundary_tokens: int
    """Tokens that reach from another segment into a completion."""
    problem: str = ""
    """Why the row cannot be used; it then has no tokens."""
    remarks: Sequence[str] = ()
    """What else a person should know of the row."""

    @property
    def weighted(self) -> dict[str, int]:
        """Segment -> number of tokens with a weight other than 0."""
        counts = Counter(token.segment for token in self.tokens if token.weight)
        return {name: counts[name] for name in (*SEGMENT_NAMES, *COMPLETIONS) if name in counts}

    @property
    def runs(self) -> Iterator[TokenRun]:
        position, previous = 0, None
        for _, group in groupby(self.tokens, key=lambda token: token.label):
            tokens = list(group)
            segment = tokens[0].segment
            is_heading = segment in COMPLETIONS and (previous or "completion") != segment
            yield TokenRun(tokens, position, segment if is_heading else "")
            position, previous = position + len(tokens), segment

    @property
    def counts(self) -> str:
        shares = segment_shares(self.weighted)
        weighted = " + ".join(f"{count} {name} ({shares[name]:.0%})" for name, count in self.weighted.items()) or "none"
        boundary = f"; {self.boundary_tokens} across a segment boundary" if self.boundary_tokens else ""
        return f"{_tokens(len(self.tokens))}, {self.truncated} truncated; in the loss: {weighted}{boundary}"

    def notes(self, max_length: int | None) -> Iterator[str]:
        """Yield remarks on a row that is not trained on as it is."""
        if self.problem:
            yield f"this row cannot be used: {self.problem}"
        elif not self.weighted and not self.remarks:
            yield "all tokens have weight 0, so training skips this row"
        yield from self.remarks
        if self.truncated:
            yield f"{_tokens(self.truncated)} truncated at max_length {max_length}; raise train.max_length to keep them"


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count != 1 else ''}"


@dataclass(frozen=True)
class Preview:
    """Some rows of one stage's training file. rich can print it."""

    step: str
    file: str
    rows: int
    max_length: int | None
    weights: dict[str, float]
    """Segment -> weight, for the segments that occur."""
    examples: list[PreviewedRow]
    explanation: str = ""
    """What the weights mean, or the share of each segment."""

    @property
    def title(self) -> str:
        return f"{self.step}: {len(self.examples)} of {self.rows} rows of {self.file}"

    def as_json(self) -> dict[str, Any]:
        """Return everything for --json."""
        return vars(self) | {
            "examples": [
                {
                    "row": example.row,
                    "tokens": [vars(token) for token in example.tokens],
                    "weighing": example.weighted,
                    "weighted_share": segment_shares(example.weighted),
                    "cut": example.truncated,
                    "merged": example.boundary_tokens,
                    "problem": example.problem,
                    "notes": list(example.notes(self.max_length)),
                }
                for example in self.examples
            ]
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        coloured = console.color_system in ("256", "truecolor") and not console.no_color
        width = min(options.max_width, MAX_WIDTH)
        labels = [run.first.label for example in self.examples for run in example.runs]
        gutter = max([len(label) + 2 for label in labels], default=0)
        yield Text(safe(self.title), style="bold")
        yield from _legend(self.weights, coloured)
        if self.explanation:
            yield Text(self.explanation, style="dim")
        for example in self.examples:
            yield Text()
            yield Text(safe(f"{self.file}:{example.row}"), style="bold")
            yield Text(f"  {example.counts}")
            for note in example.notes(self.max_length):
                yield Text.assemble(("  note: ", "bold"), safe(note))
            for run in example.runs:
                if run.heading:
                    yield Text(f"  {'':{gutter}} {'─' * 12} {run.heading} {'─' * 12}", style="bold")
                lines = _lines(run, coloured, width - gutter - 4)
                for label, line in zip([f"[{run.first.label}]", *[""] * len(lines)], lines, strict=False):
                    yield Text.assemble("  ", (f"{label:>{gutter}}", "dim"), " ", line)


def _legend(weights: dict[str, float], coloured: bool) -> Iterator[Text]:
    line = Text()
    for name, weight in weights.items():
        style = _style(name, bool(weight), False, 0) if coloured else ""
        line.append(f" {name} {TIMES}{weight:g} ", style=style)
        line.append("  ")
    yield line
    symbols = "{} space, {} line end, {} tab".format(*WHITE_SPACE_SYMBOLS.values())
    marks = (
        "underlined: special token; no background: weight 0" if coloured else f"{SEPARATOR} between tokens, ⟦special⟧"
    )
    yield Text(f"{symbols}; {marks}", style="dim")


def _style(segment: str, has_weight: bool, special: bool, shade: int) -> str:
    marks = "bold underline " if special else ""
    return marks + (f"#14181e on {COLOURS[segment][shade]}" if has_weight else COLOURS[segment][2 + shade])


def _lines(run: TokenRun, coloured: bool, width: int) -> list[Text]:
    """Wrap the run's tokens after newlines, and between tokens at `width`."""
    lines = [Text()]
    starts_line = True
    for index, token in enumerate(run.tokens):
        style = _style(token.segment, bool(token.weight), token.special, index % 2) if coloured else ""
        parts = token.lines
        if not coloured:
            parts = [f"⟦{''.join(parts)}⟧"] if token.special else parts
            parts[:1] = [("" if starts_line else SEPARATOR) + part for part in parts[:1]]
        for part in parts:
            if lines[-1].cell_len + cell_len(part) > width and lines[-1]:
                lines.append(Text())
            chunks = chop_cells(part, max(width, 1))
            for chunk in chunks[:-1]:
                lines[-1].append(chunk, style=style)
                lines.append(Text())
            lines[-1].append(chunks[-1], style=style)
            starts_line = part.endswith("↵")
            if starts_line:
                lines.append(Text())
    return lines if lines[-1] else lines[:-1]


class TokenTexts:
    """Decode single tokens of a fast tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in decoder else None
        self._byte_fallback = "ByteFallback" in decoder

    def special(self, id: int) -> bool:
        return id in self._tokenizer.all_special_ids or (id in self._added and self._added[id].special)

    def token(self, id: int, segment: str, weight: float, label: str) -> Token:
        """Return a token for display."""
        return Token(id, self.text(id), segment, weight, self.special(id), label)

    def text(self, id: int) -> str:
        """Return what the token adds to a text; bytes that are part of a character as `<0xC3>`."""
        if id in self._added:
            return self._added[id].content
        token = self._tokenizer.backend_tokenizer.id_to_token(id)
        if token is None:
            return f"<id {id}>"
        if self._bytes is not None and all(char in self._bytes for char in token):
            return "".join(_decode(bytes(self._bytes[char] for char in token)))
        if self._byte_fallback and (byte := _BYTE.fullmatch(token)):
            return "".join(_decode(bytes.fromhex(byte[1])))
        return token.replace("▁", " ")


def visible(text: str) -> str:
    """Replace white space by symbols, and characters that are invisible or control a terminal by their number."""
    return safe("".join(WHITE_SPACE_SYMBOLS.get(char, char) for char in text))


def _decode(raw: bytes) -> Iterator[str]:
    """Yield the complete characters, and the other bytes as `<0xC3>`."""
    while raw:
        try:
            yield raw.decode()
            return
        except UnicodeDecodeError as error:
            yield raw[: error.start].decode()
            yield "".join(f"<0x{byte:02X}>" for byte in raw[error.start : error.end])
            raw = raw[error.end :]
