"""A preview of an sft stage on a terminal: tokens on coloured ground, or set apart by marks where colours fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions
from rich.text import Text

from stages.data.segments import Segment
from stages.sft.token_display import SIGNS, TIMES, visible
from stages.system.terminal_text import safe

if TYPE_CHECKING:
    from stages.sft.preview import Preview, Run

FILLED = {
    Segment.PROMPT: ("#9ccbf5", "#c3e0fa"),
    Segment.COMPLETION: ("#ffb454", "#ffd59b"),
    Segment.SYSTEM: ("#d3a4e3", "#e7cbf0"),
    Segment.TEMPLATE: ("#c4c9d0", "#dfe2e7"),
    Segment.TEXT: ("#7ed6b1", "#b4e8d2"),
    Segment.GIVEN: ("#efdc66", "#f7eeab"),
}
"""Backgrounds of tokens that weigh, two shades in turn; hues that stay apart for the colour-blind (Okabe and Ito)."""
FAINT = {
    Segment.PROMPT: ("#4a86b8", "#74a5cc"),
    Segment.COMPLETION: ("#b8732a", "#cf9556"),
    Segment.SYSTEM: ("#96629f", "#b08ab8"),
    Segment.TEMPLATE: ("#7a828c", "#989fa8"),
    Segment.TEXT: ("#3a9470", "#68b092"),
    Segment.GIVEN: ("#94851f", "#b3a551"),
}
"""Letters of tokens that do not weigh, which have no background."""
WIDEST = 120
"""Columns of a terminal that are used at most."""
BETWEEN = "¦"
"""Stands between tokens where colours cannot tell them apart."""


@dataclass(frozen=True)
class OnTerminal:
    """What rich prints of a preview."""

    preview: Preview

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        coloured = console.color_system in ("256", "truecolor") and not console.no_color
        width = min(options.max_width, WIDEST)
        labels = [run.first.label for example in self.preview.examples for run in example.runs]
        gutter = max([len(label) + 2 for label in labels], default=0)
        yield Text(safe(self.preview.title), style="bold")
        yield from _legend(self.preview.weights, coloured)
        for example in self.preview.examples:
            yield Text()
            yield Text(safe(f"{self.preview.file}:{example.row}"), style="bold")
            yield Text(f"  {example.counts}")
            for note in example.notes(self.preview.max_length):
                yield Text.assemble(("  note: ", "bold"), visible(note, spaces=False))
            for run in example.runs:
                if run.boundary:
                    yield Text(f"  {'':{gutter}} {'─' * 12} completion {'─' * 12}", style="bold")
                lines = _lines(run, coloured, width - gutter - 4)
                for label, line in zip([f"[{run.first.label}]", *[""] * len(lines)], lines, strict=False):
                    yield Text.assemble("  ", (f"{label:>{gutter}}", "dim"), " ", line)


def _legend(weights: dict[str, float], coloured: bool) -> Iterator[Text]:
    line = Text()
    for name, weight in weights.items():
        segment = Segment[name.upper()]
        line.append(f" {name} {TIMES}{weight:g} ", style=_style(segment, bool(weight), False, 0) if coloured else "")
        line.append("  ")
    yield line
    marks = ["{} space, {} line end, {} tab".format(*SIGNS.values())]
    marks += ["underlined: special, without ground: weighs 0" if coloured else f"{BETWEEN} between tokens, ⟦special⟧"]
    yield Text("; ".join(marks), style="dim")


def _style(segment: Segment, weighs: bool, special: bool, shade: int) -> str:
    marks = "bold underline " if special else ""
    return marks + (f"#14181e on {FILLED[segment][shade]}" if weighs else FAINT[segment][shade])


def _lines(run: Run, coloured: bool, width: int) -> list[Text]:
    """The run's tokens, in lines that end at line ends, or at a token where the width does."""
    lines = [Text()]
    fresh = True
    for number, token in enumerate(run.tokens):
        style = _style(token.segment, bool(token.weight), token.special, number % 2) if coloured else ""
        parts = token.shown
        if not coloured:
            parts = [f"⟦{''.join(parts)}⟧"] if token.special else parts
            parts[:1] = [("" if fresh else BETWEEN) + part for part in parts[:1]]
        for part in parts:
            if lines[-1].cell_len + cell_len(part) > width and lines[-1]:
                lines.append(Text())
            chunks = chop_cells(part, max(width, 1))
            for chunk in chunks[:-1]:
                lines[-1].append(chunk, style=style)
                lines.append(Text())
            lines[-1].append(chunks[-1], style=style)
            fresh = part.endswith("↵")
            if fresh:
                lines.append(Text())
    return lines if lines[-1] else lines[:-1]
