"""A grid of weights in a report: means, spreads, improvements and sentences against hand calculation; its files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.base import Context, Input
from stages.report.config import ReportStage
from stages.report.correlations import rank_correlations
from stages.report.grid import Grid, find_grids
from stages.report.results import Results, read_results
from stages.report.runs import Run
from stages.report.sampling_errors import rounded
from stages.report.sentences import summary
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


def grid_summary(panel: Grid) -> str:
    """The summary of a report that shows nothing but this grid."""
    return summary(Run(None, (None, None), Results([], [], {}), None), [], [panel])


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


def test_uneven_seeds_compare_the_means_shown_and_claim_nothing() -> None:
    """(0, 1) has one seed, 50; (0.2, 0.8) has 70, 50 and 33: 51 on average, 1 above it, with no error to go by."""
    inputs = {
        f"bench[wit,{p},{c},{s}]": cell(p, c, s, score)
        for p, c, s, score in ((0, 1, 1, 0.5), (0.2, 0.8, 1, 0.7), (0.2, 0.8, 2, 0.5), (0.2, 0.8, 3, 0.33))
    }
    inputs |= {"bench[wit,0,0.8]": cell(0, 0.8, 1, 0.1)}
    (panel,) = find_grids(read_results(inputs))
    difference = panel.difference_from_baseline((0.2, 0.8))
    assert difference
    assert (round(difference.value, 9), difference.stderr) == (0.01, None)
    assert panel.p_value((0.2, 0.8)) is None
    assert "1 of the other 2 pairs average above (0, 1), 0 of them by more than two standard errors" in grid_summary(
        panel
    )
    assert panel.left_out == [
        "Not measured: (0.2, 1).",
        "Pairs have 1 to 3 seeds; a pair with one seed has no error against one with several.",
    ]


def named(inputs: dict[str, Input], axes: dict[str, dict[str, str]]) -> dict[str, Input]:
    """The same steps with names in place of numbers as the values of their axes; an empty axis is left out."""
    changed = {}
    for name, step in inputs.items():
        if not step.labels:
            changed[name] = step
            continue
        labels = {axis: axes.get(axis, {}).get(value, value) for axis, value in step.labels.items()}
        training = replace(step.inputs["model"], labels=labels)
        changed[name] = replace(step, labels=labels, inputs={"model": training})
    return changed


@pytest.mark.parametrize(
    "axes",
    [
        {"prompt": {"0": "none", "0.2": "some"}, "completion": {"0.4": "most", "1": "full"}},
        {"prompt": {"0": "none", "0.2": "some"}, "seed": {"1": "first", "2": "second"}},
    ],
)
def test_axes_with_names_are_recognised_by_what_they_set(axes: dict[str, dict[str, str]]) -> None:
    (plain,), (panel,) = (find_grids(read_results(inputs)) for inputs in (grid(), named(grid(), axes)))
    assert panel.title == plain.title
    assert panel.cells == plain.cells


def test_one_axis_for_both_weights_is_recognised() -> None:
    inputs = {}
    for key, step in grid().items():
        if step.labels:
            pair = {"pair": f"{step.labels['prompt']} and {step.labels['completion']}", "seed": step.labels["seed"]}
            step = replace(step, labels=pair, inputs={"model": replace(step.inputs["model"], labels=pair)})
        inputs[key] = step
    (panel,) = find_grids(read_results(inputs))
    assert (panel.title, len(panel.cells)) == ("wit", 4)


def test_an_axis_that_sets_something_else_names_its_grid() -> None:
    """Two learning rates, with all pairs of weights each."""
    both = grid(rate="1e-5") | {f"{name}2": step for name, step in grid(rate="1e-4").items()}
    assert [one.title for one in find_grids(read_results(both))] == ["wit, rate=1e-5", "wit, rate=1e-4"]


def test_sums_that_differ_in_their_last_bits_alone_are_equal() -> None:
    """0.1 + 0.2 and 0.3, the averages of two benchmarks: the lower prompt weight is the best of equals."""
    scores = {(0, 1): (0.1, 0.2), (0, 0.4): (0.0, 0.1), (0.2, 0.4): (0.1, 0.1), (0.2, 1): (0.3, 0.0)}
    inputs = {}
    for (prompt, completion), values in scores.items():
        step = cell(prompt, completion, 1, 0)
        rows = [row(task, value, 0.01) for task, value in zip(("t", "u"), values, strict=True)]
        inputs[f"bench[wit,{prompt},{completion}]"] = replace(step, metrics=step.metrics.extended(results=rows))
    results = read_results(inputs)
    (panel,) = find_grids(results)
    assert 0.1 + 0.2 != 0.3
    assert panel.best == (0, 1)
    assert panel.cells[0, 1].mean == panel.cells[0.2, 1].mean
    assert "0 of the other 3 pairs average above (0, 1)" in grid_summary(panel)


def test_ranks_of_equal_sums_are_equal() -> None:
    """All pairs of shares k / 50 whose sum is 0.3 are one rank: a constant has no rank correlation."""
    sums = [k / 50 + (15 - k) / 50 for k in range(16)]
    assert len(set(sums)) > 1
    assert len(set(map(rounded, sums))) == 1
    assert rank_correlations([(total, index) for index, total in enumerate(sums)]) == (None, None)
