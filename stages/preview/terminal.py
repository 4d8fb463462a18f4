"""Show a preview on a terminal: segments as background colours, or as labels and marks if there are no colours."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions
from rich.text import Text

from stages.preview.token_display import TIMES, WHITE_SPACE_SYMBOLS, Preview, TokenRun
from stages.system.terminal_text import safe

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


@dataclass(frozen=True)
class TerminalPreview:
    """What rich prints."""

    preview: Preview

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        coloured = console.color_system in ("256", "truecolor") and not console.no_color
        width = min(options.max_width, MAX_WIDTH)
        labels = [run.first.label for example in self.preview.examples for run in example.runs]
        gutter = max([len(label) + 2 for label in labels], default=0)
        yield Text(safe(self.preview.title), style="bold")
        yield from _legend(self.preview.weights, coloured)
        if self.preview.explanation:
            yield Text(self.preview.explanation, style="dim")
        for example in self.preview.examples:
            yield Text()
            yield Text(safe(f"{self.preview.file}:{example.row}"), style="bold")
            yield Text(f"  {example.counts}")
            for note in example.notes(self.preview.max_length):
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
