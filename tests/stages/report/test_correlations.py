"""Rank correlations against hand calculation, and in a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages.base import Context, Input
from stages.report.config import ReportStage
from stages.report.correlations import rank_correlations
from stages.report.stage import run
from tests.stages.report.test_report import bench, row, sft

BEST = {"short": 0.2, "middle": 0.6, "long": 0.4}
"""Benchmark -> the prompt weight that is best under it."""
LENGTHS = {"short": 5.0, "middle": 9.0, "long": 14.0}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # y's ranks 1, 3, 2: 1 - 6 x 2 / (3 x 8); of three pairs two agree and one does not
        ([(1, 0.2), (2, 0.6), (3, 0.4)], (0.5, 1 / 3)),
        ([(1, 0.4), (2, 0.2), (3, 0.0)], (-1, -1)),
        # ranks 1, 2.5, 2.5: 1.5 / sqrt(2 x 1.5); tau-b 2 / sqrt(3 x 2)
        ([(1, 0), (2, 0.2), (3, 0.2)], (0.8660254, 0.8164966)),
        ([(1, 0), (2, 1)], (None, None)),
        ([(1, 0.2), (2, 0.2), (3, 0.2)], (None, None)),
    ],
)
def test_by_hand(points: list[tuple[float, float]], expected: tuple[float | None, float | None]) -> None:
    assert rank_correlations(points) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_over_the_benchmarks_of_a_grid(tmp_path: Path) -> None:
    inputs: dict[str, Input] = {}
    for prompt in (0.0, 0.2, 0.4, 0.6):
        for completion in (0.4, 1.0):
            labels = {"prompt": f"{prompt:g}", "completion": f"{completion:g}"}
            rows = [row(name, 0.5 + 0.1 * (best == prompt) - 0.01 * completion, 0.01) for name, best in BEST.items()]
            training = replace(sft("wit", prompt, completion), labels=labels)
            inputs[f"bench[wit,{labels}]"] = replace(bench("wit", training, rows), labels=labels)
    plain = {"headline": False, "higher_is_better": None}
    traits = [row(name, length, None, metric="prompt_length", **plain) for name, length in LENGTHS.items()]
    traits += [row("model", 1e6, None, metric="parameters", **plain)]
    sets = [{"name": name, "role": "eval"} for name in LENGTHS]
    inputs["traits[base]"] = replace(
        bench("base", Input(Path()), traits), kind="characteristics", config={"models": ["base"], "sets": sets}
    )
    run(Context("r", "report", ReportStage(), inputs, tmp_path, tmp_path, tmp_path, tmp_path, lambda *_: None))
    text = (tmp_path / "report.md").read_text()
    assert "| benchmark prompts | prompt_length | 3 | +0.50 | +0.33 |" in text  # lengths 1, 2, 3; best 1, 3, 2
    assert "| model | parameters | 1 | – | – |" in text  # noqa: RUF001
    assert "Here they are over 1 to 3 of these." in text
    assert "| wit | (0.2, 0.4)" in text
