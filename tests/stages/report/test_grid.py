"""A grid of weights in a report: means, spreads, improvements and sentences against hand calculation; its files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.base import Context, Input
from stages.report.config import ReportStage
from stages.report.grid import find_grids
from stages.report.results import read_results
from stages.report.sentences import grid_summary
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


def cell(prompt: float, completion: float, seed: int, score: float, **axes: str) -> Input:
    labels = {"prompt": f"{prompt:g}", "completion": f"{completion:g}", "seed": str(seed), **axes}
    training = sft("wit", prompt, completion)
    training = replace(training, config=training.config | {"seed": seed}, labels=labels)
    return replace(bench("wit", training, [row("know", score, 0.01)]), labels=labels)


def grid(**axes: str) -> dict[str, Input]:
    """The benchmarks of the grid above and of the base model, for one cell of further axes."""
    suffix = ",".join(f"{axis}={value}" for axis, value in axes.items())
    cells = {f"bench[wit,{key},{suffix}]": cell(*key, score, **axes) for key, score in AVERAGES.items()}
    return {"bench[base]": bench("base", Input(Path()), [row("know", 0.21, 0.01)])} | cells


def test_means_spreads_and_improvements_by_hand() -> None:
    (panel,) = find_grids(read_results(grid()))
    cells = panel.cells
    assert panel.title == "wit"  # the cells show prompt, completion and seed
    assert (panel.prompts, panel.completions) == ([0, 0.2], [0.4, 1])
    assert cells[0, 1].mean == pytest.approx(0.42)
    assert cells[0, 1].spread == pytest.approx(0.04 / math.sqrt(2))  # of two: their distance / sqrt(2)
    assert cells[0, 0.4].spread == pytest.approx(0)
    assert panel.best == (0.2, 0.4)
    assert panel.improvement(cells[0.2, 0.4]) == pytest.approx((0.52 - 0.42) / 0.42)
    assert panel.improvement(cells[0.2, 1]) == pytest.approx((0.31 - 0.42) / 0.42)
    assert panel.base
    assert panel.improvement(panel.base) == pytest.approx(-0.5)


def test_the_summary() -> None:
    text = grid_summary(find_grids(read_results(grid()))[0])
    assert "the best of 4 pairs of weights (prompt, completion) is (0.2, 0.4) with 52.0" in text
    assert "conventional tuning (0, 1) has 42.0: a relative gain of +23.8 %" in text  # 10 / 42
    # sqrt(0.0008 / 2 + 0.0008 / 2) = 0.028; 0.10 is more than twice that
    assert "1 of the other 3 pairs average above (0, 1), 1 of them by more than two standard errors" in text
    assert (
        "(0, 0.4) and (0, 1) differ in a common factor, which Adam all but cancels; they are up to 1.0 points apart"
        in text
    )
    # sqrt((0.0008 + 0 + 0.0008 + 0.0002) / 4) = 0.0212
    assert "Over seeds, one pair varies by 2.1 points" in text


def test_the_summary_names_every_pair_that_is_conventional_but_for_a_factor() -> None:
    """0.41 and 0.45 against 0.42."""
    inputs = grid() | {f"bench[wit,{p:g},0.8]": cell(p, 0.8, 1, 0.45) for p in (0, 0.2)}
    text = grid_summary(find_grids(read_results(inputs))[0])
    assert "(0, 0.4), (0, 0.8) and (0, 1) differ in a common factor" in text
    assert "they are up to 3.0 points apart" in text


def test_with_one_seed_the_errors_are_those_over_items() -> None:
    one_seed = {name: step for name, step in grid().items() if step.labels.get("seed") != "2"}
    text = grid_summary(find_grids(read_results(one_seed))[0])
    # 0.41 - 0.40 is within 2 x sqrt(0.0002) = 0.028, 0.50 - 0.40 is not
    assert "2 of the other 3 pairs average above (0, 1), 1 of them by more than two standard errors" in text
    assert "There is one seed of each" in text


def test_other_axes_make_separate_grids() -> None:
    both = grid(data="lima") | {f"{name}2": step for name, step in grid(data="alpaca").items()}
    assert [one.title for one in find_grids(read_results(both))] == ["wit, data=lima", "wit, data=alpaca"]


def test_too_few_pairs_are_no_grid() -> None:
    column = {name: step for name, step in grid().items() if step.labels.get("prompt") != "0.2"}
    assert find_grids(read_results(column)) == []


def test_the_report_has_the_picture_and_the_table(tmp_path: Path) -> None:
    outputs = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        context = Context("r", "report", ReportStage(), grid(), out, out, out, out, lambda *_: None)
        run(context)
        outputs.append({str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert outputs[0] == outputs[1]
    assert outputs[0]["figures/heatmap.png"].startswith(b"\x89PNG")
    ElementTree.fromstring(outputs[0]["figures/heatmap.svg"])
    assert "figures/scores.svg" in outputs[0]
    text = outputs[0]["report.md"].decode()
    assert "| prompt weight | completion 0.4 | completion 1 |" in text
    assert "| 0.2 | **52.0 ± 2.8** | 31.0 ± 1.4 |" in text
    assert "![The tables below as heatmaps, laid out alike](figures/heatmap.svg)" in text
    assert outputs[0]["report.html"].decode().count("data:image/svg+xml;base64,") == 2
