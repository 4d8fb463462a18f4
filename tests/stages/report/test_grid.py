"""A grid of weights in a report: means, spreads, gains and words as worked out by hand; the picture, and its cells."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.base import Context, Input
from stages.report.config import ReportStage
from stages.report.grid import grid_summary, panels
from stages.report.results import read
from stages.report.stage import run
from tests.stages.report.test_report import bench, row, sft

AVERAGES = {  # prompt, completion, seed -> score; the error of every one is 0.01
    (0, 1, 1): 0.40,
    (0, 1, 2): 0.44,
    (0, 0.4, 1): 0.41,
    (0, 0.4, 2): 0.41,
    (0.2, 0.4, 1): 0.50,
    (0.2, 0.4, 2): 0.54,
    (0.2, 1, 1): 0.30,
    (0.2, 1, 2): 0.32,
}


def cell(prompt: float, completion: float, seed: int, score: float, **more: str) -> Input:
    labels = {"prompt": f"{prompt:g}", "completion": f"{completion:g}", "seed": str(seed), **more}
    made = sft("wit", prompt, completion)
    made = replace(made, config=made.config | {"seed": seed}, labels=labels)
    return replace(bench("wit", made, [row("know", score, 0.01)]), labels=labels)


def grid(**more: str) -> dict[str, Input]:
    """The benchmarks of the grid above and of the base model."""
    named = ",".join(f"{axis}={value}" for axis, value in more.items())
    made = {f"bench[wit,{key},{named}]": cell(*key, score, **more) for key, score in AVERAGES.items()}
    return {"bench[base]": bench("base", Input(Path()), [row("know", 0.21, 0.01)])} | made


def test_means_spreads_and_gains_by_hand() -> None:
    (panel,) = panels(read(grid()))
    assert panel.title == "wit"  # prompt, completion and seed are told by the cells
    assert (panel.prompts, panel.completions) == ([0, 0.2], [0.4, 1])
    assert panel.cells[0, 1].mean == pytest.approx(0.42)
    assert panel.cells[0, 1].spread == pytest.approx(0.04 / math.sqrt(2))  # of two: their distance / sqrt(2)
    assert panel.cells[0, 0.4].spread == pytest.approx(0)
    assert panel.best == (0.2, 0.4)
    assert panel.gain(panel.cells[0.2, 0.4]) == pytest.approx((0.52 - 0.42) / 0.42)
    assert panel.gain(panel.cells[0.2, 1]) == pytest.approx((0.31 - 0.42) / 0.42)
    assert panel.base
    assert panel.gain(panel.base) == pytest.approx(-0.5)


def test_the_words() -> None:
    results = read(grid())
    said = grid_summary(results, panels(results)[0])
    assert "the best of 4 pairs of weights (prompt, completion) is (0.2, 0.4) with 52.0" in said
    assert "conventional tuning (0, 1) has 42.0: a relative gain of +23.8 %" in said  # 10 / 42
    # sqrt(0.0008 / 2 + 0.0008 / 2) = 0.028; 0.10 is more than twice that
    assert "1 of the other 3 pairs average above (0, 1), 1 of them by more than two standard errors" in said
    assert (
        "(0, 0.4) and (0, 1) differ in a common factor, which Adam all but cancels; they are 1.0 points apart" in said
    )
    # sqrt((0.0008 + 0 + 0.0008 + 0.0002) / 4) = 0.0212
    assert "Over seeds, one pair varies by 2.1 points" in said


def test_with_one_seed_the_items_say_what_is_clear() -> None:
    one = {name: given for name, given in grid().items() if given.labels.get("seed") != "2"}
    results = read(one)
    said = grid_summary(results, panels(results)[0])
    # 0.41 - 0.40 is within 2 x sqrt(0.0002) = 0.028, 0.50 - 0.40 is not
    assert "2 of the other 3 pairs average above (0, 1), 1 of them by more than two standard errors" in said
    assert "There is one seed of each" in said


def test_other_axes_make_panels_of_their_own() -> None:
    both = grid(data="lima") | {f"{name}2": given for name, given in grid(data="alpaca").items()}
    assert [panel.title for panel in panels(read(both))] == ["wit, data=lima", "wit, data=alpaca"]


def test_too_few_pairs_are_no_grid() -> None:
    column = {name: given for name, given in grid().items() if given.labels.get("prompt") != "0.2"}
    assert panels(read(column)) == []


def test_the_report_has_the_picture_and_the_table(tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        context = Context("r", "report", ReportStage(), grid(), out, out, out, out, lambda *_: None)
        run(context)
        written.append({str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert written[0] == written[1]
    assert written[0]["figures/heatmap.png"].startswith(b"\x89PNG")
    ElementTree.fromstring(written[0]["figures/heatmap.svg"])
    assert "figures/scores.svg" in written[0]
    text = written[0]["report.md"].decode()
    assert "| prompt weight | completion 0.4 | completion 1 |" in text
    assert "| 0.2 | **52.0 ± 2.8** | 31.0 ± 1.4 |" in text
    assert "![The tables below as heatmaps, laid out alike](figures/heatmap.svg)" in text
    assert written[0]["report.html"].decode().count("data:image/svg+xml;base64,") == 2
