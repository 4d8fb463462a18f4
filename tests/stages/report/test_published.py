"""Reports on the published grids (arXiv 2507.07817, Figure 1), against arithmetic on the file and the paper's text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from stages.base import Context, Input, UserError
from stages.report.config import PUBLISHED, ReportStage
from stages.report.grid import read_published_grids
from stages.report.improvements import SHARES
from stages.report.stage import run
from tests.pipeline.run.test_command import command
from tests.stages.report.test_grid import grid

ROOT = Path(__file__).resolve().parents[3]
FIGURE = ROOT / "recipes" / "paper" / "figure1.csv"
IMPROVEMENTS = {  # best pair and improvement over (0, 1), worked out with a pocket calculator from the file's rows
    "Llama-3-1B, Tulu-v2": ("(0.6, 1)", "+10.52 %"),  # 31.61 / 28.60
    "Gemma-2-2B, Tulu-v2": ("(0.2, 0.8)", "+2.61 %"),  # 48.42 / 47.19
    "Mistral-7B, Alpaca-Cleaned": ("(0.6, 0.4)", "+20.25 %"),  # 64.02 / 53.24
    "Llama-3-8B, LIMA": ("(1, 0.4)", "+11.13 %"),  # 50.54 / 45.48
}


def rows() -> dict[str, dict[tuple[float, float], float]]:
    """Grid -> pair -> points, read without the report's code."""
    grids: dict[str, dict[tuple[float, float], float]] = {}
    with FIGURE.open() as lines:
        for row in csv.DictReader(lines):
            pair = float(row["prompt_weight"]), float(row["response_weight"])
            cells = grids.setdefault(f"{row['model']}, {row['dataset']}", {})
            cells[pair] = float(row["average_score"])
    return grids


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The console's table after recipes/paper/figure1.yaml: grid -> column -> text."""
    folder = tmp_path_factory.mktemp("figure1")
    (folder / "r.yaml").write_text(f"extends: {ROOT / 'recipes' / 'paper' / 'figure1.yaml'}\n")
    done = command(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((folder / "runs" / "paper-figure1" / "report" / "stage.json").read_text())
    shown = manifest["metrics"]["table"]
    assert (folder / "runs/paper-figure1/report/figures/heatmap.png").stat().st_size > 100_000
    return {row[0]: dict(zip(shown["columns"], row, strict=True)) for row in shown["rows"]}


def test_the_fifteen_circled_cells_and_their_improvements(table: dict[str, dict[str, str]]) -> None:
    grids = rows()
    assert len(grids) == 15
    assert set(table) == {*grids, "mean"}
    improvements = []
    for name, cells in grids.items():
        tuned = {pair: score for pair, score in cells.items() if pair != (0, 0)}
        assert len(tuned) == 35
        top = max(tuned.values())
        circled = min(pair for pair, score in tuned.items() if score == top)
        improvements.append(100 * (top - cells[0, 1]) / cells[0, 1])
        assert table[name]["its weights"] == f"({circled[0]:g}, {circled[1]:g})"
        assert table[name]["gain over IT"] == f"{improvements[-1]:+.2f} %"
        assert (table[name]["base"], table[name]["IT (0, 1)"], table[name]["best"]) == (
            f"{cells[0, 0]:.2f}",
            f"{cells[0, 1]:.2f}",
            f"{top:.2f}",
        )
    assert table["mean"]["gain over IT"] == f"{sum(improvements) / 15:+.2f} %" == "+6.76 %"


@pytest.mark.parametrize("name", IMPROVEMENTS)
def test_by_hand(table: dict[str, dict[str, str]], name: str) -> None:
    assert (table[name]["its weights"], table[name]["gain over IT"]) == IMPROVEMENTS[name]


def test_the_shares_by_hand() -> None:
    best = [panel.best for panel in read_published_grids(FIGURE)]
    expected = []
    for cells in rows().values():
        top = max(score for pair, score in cells.items() if pair != (0, 0))
        expected.append(min(pair for pair, score in cells.items() if score == top and pair != (0, 0)))
    assert best == expected
    counts = {name: sum(map(holds, best)) for name, holds in SHARES.items()}
    assert list(counts.values()) == [
        sum(p <= 0.6 for p, _ in expected),
        sum(p > 0 for p, _ in expected),
        sum(r == 1 for _, r in expected),
        sum(r >= 0.4 for _, r in expected),
    ]
    assert 0 < counts["best prompt weight not 0"] < 15


HEAD = "model,dataset,prompt_weight,response_weight,average_score\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "2: has no column model, dataset"),
        (f"{HEAD}m,d,0,1,nought\n", "2: average_score is 'nought'; it is in points, between 0 and 100"),
        (f"{HEAD}m,d,0,1\n", "2: has 4 cells, but the header has 5"),
        (f"{HEAD}m,d,0,2,50\n", "2: response_weight is '2'; weights are numbers, between 0 and 1"),
        (f"{HEAD}m,d,0,1,nan\n", "2: average_score is 'nan'; it is in points"),
        (f"{HEAD}m,d,0,1,50\nm,d,0,1,51\n", "3: m, d has (0.0, 1.0) twice"),
        (f"{HEAD}m,d,0,0,50\n", "m, d has no pair of weights except (0, 0)"),
        (HEAD, "has no rows"),
    ],
)
def test_a_faulty_file_is_an_error_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "grids.csv").write_text(text)
    (tmp_path / "r.yaml").write_text("name: r\nstages: {report: {kind: report, published: ./grids.csv}}\n")
    with pytest.raises(UserError) as error:
        ReportStage(published="./grids.csv").check({PUBLISHED: tmp_path / "grids.csv"})
    assert message in str(error.value)


def test_values_of_another_type_are_an_error_with_their_place(tmp_path: Path) -> None:
    row = {"model": ["m"], "dataset": {}, "prompt_weight": 0, "response_weight": [1], "average_score": 50}
    (tmp_path / "grids.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"grids\.jsonl:1: response_weight is \[1\]; weights are numbers"):
        ReportStage(published="./grids.jsonl").check({PUBLISHED: tmp_path / "grids.jsonl"})


def test_the_command_names_the_fault_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "grids.csv").write_text(f"{HEAD}m,d,0,1,nought\n")
    (tmp_path / "r.yaml").write_text("name: r\nstages: {report: {kind: report, published: ./grids.csv}}\n")
    done = command(tmp_path)
    assert done.returncode == 2
    assert "grids.csv:2: average_score is 'nought'" in done.stderr
    assert not (tmp_path / "runs" / "r").exists()


def test_a_grid_is_compared_with_the_published_one(tmp_path: Path) -> None:
    """The published grid of the same model and data has 24.57 and 24.68, ours 42 and 52."""
    (tmp_path / "out").mkdir()
    config = ReportStage(model_name="Llama-3-1B", data_name="LIMA", published="figure1.csv")
    inputs: dict[str, Any] = grid() | {PUBLISHED: Input(FIGURE)}
    run(Context("r", "report", config, inputs, tmp_path / "out", tmp_path, tmp_path, tmp_path, lambda *_: None))
    text = (tmp_path / "out" / "report.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| Llama-3-1B, LIMA |")][:1]
    assert [part.strip() for part in row.strip("|").split("|")] == [
        *("Llama-3-1B, LIMA", "4", "21.00", "42.00 ± 2.83", "52.00 ± 2.83", "(0.2, 0.4)", "+23.81 %"),
        "0.072",  # Welch: t = 0.10 / sqrt(0.0004 + 0.0004) = 3.5355 with 2 degrees of freedom, 1 - t / sqrt(2 + t^2)
        *("24.57", "24.68", "(0, 0.4)", "+0.45 %", "+23.36 points"),
    ]
    assert "| Mistral-7B" not in text
    assert (tmp_path / "out" / "figures" / "published.svg").is_file()
