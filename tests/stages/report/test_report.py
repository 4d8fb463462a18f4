"""Reports on hand-written scores: averages, standard errors, sentences and files against hand calculation."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from stages.base import Context, Input, Need, UserError
from stages.records.metrics import Metrics, ResultTable, ScoreRow
from stages.report.config import ReportStage
from stages.report.page import latex_text
from stages.report.results import find_baseline, read_results
from stages.report.stage import run

Make = Callable[..., Context]


def row(task: str, value: float | None, stderr: float | None = None, **fields: Any) -> ScoreRow:
    """A score as the lm_eval stage returns it."""
    defaults = {"metric": "acc", "filter": "none", "n": 100, "headline": True, "higher_is_better": True}
    return ScoreRow(**({"task": task, "value": value, "stderr": stderr} | defaults | fields))


def sft(name: str, prompt: float, completion: float) -> Input:
    """A tuned model."""
    config = {"weights": {"prompt": prompt, "completion": completion}, "seed": 23, "model": "base"}
    metrics = Metrics(train_loss=0.25, steps=400, tokens=123456, seconds=75.5)
    return Input(Path(), name, "sft", config=config, metrics=metrics, inputs={"model": Input(Path())})


def bench(model: str, start: Input, rows: list[ScoreRow], path: Path | None = None) -> Input:
    """A benchmark step of the model that the step `start` trained."""
    config = {"models": [model], "options": {"apply_chat_template": True, "limit": None}, "seed": 23}
    metrics = Metrics(
        results=rows,
        versions={"know": 1.0},
        num_fewshot={"know": 0},
        environment={"dtype": "float32", "lm_eval": "0.4.13"},
        samples={p.stem.removeprefix("samples_"): p.name for p in path.glob("samples_*.jsonl")} if path else {},
    )
    return Input(path or Path("/nowhere"), f"bench[{model}]", "lm_eval", "", config, metrics, inputs={"model": start})


def with_scores(step: Input, rows: list[ScoreRow]) -> Input:
    """The step with other scores."""
    return replace(step, metrics=step.metrics.extended(results=rows))


def table_rows(context: Context) -> list[list[str]]:
    """Run the report; the rows of the console's table."""
    table = run(context).table
    assert table
    return table.rows


def world() -> dict[str, Input]:
    """base, it, wit and a dpo from wit, on two benchmarks and one further metric."""
    wit = sft("wit", 0.2, 0.8)
    dpo = Input(Path(), "dpo", "dpo", config={"seed": 23, "model": "wit"}, inputs={"model": wit})
    held = {"headline": False, "metric": "acc_held"}
    return {
        f"bench[{name}]": bench(name, start, [row("know", a, 0.03), row("reason", b, 0.04), row("know", c, **held)])
        for name, start, a, b, c in (
            ("base", Input(Path()), 0.20, 0.10, 0.05),
            ("it", sft("it", 0.0, 1.0), 0.60, 0.50, 0.40),
            ("wit", wit, 0.61, 0.53, 0.45),
            ("dpo", dpo, 0.80, 0.90, 0.50),
        )
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(inputs, **section) -> a context with an empty `out`."""
    numbers = count(1)

    def context(inputs: dict[str, Input], recipe: str = "tiny", **section: Any) -> Context:
        out = tmp_path / f"out{next(numbers)}"
        out.mkdir()
        return Context(
            recipe, "report", ReportStage(**section), inputs, out, tmp_path, tmp_path, tmp_path, lambda *_: None
        )

    return context


def test_the_main_table_by_hand(make: Make) -> None:
    # Average: (60 + 50) / 2 = 55, its error sqrt(3^2 + 4^2) / 2 = 2.5. Without samples, a difference of
    # two models has the errors 3 sqrt 2 and 4 sqrt 2 per benchmark: together sqrt(18 + 32) / 2 = 3.54.
    metrics = run(make(world()))
    assert metrics.table == ResultTable(
        columns=["model", "know", "reason", "average", "vs it"],
        rows=[
            ["dpo from wit", "80.0 ± 3.0", "90.0 ± 4.0", "85.0 ± 2.5", "+30.0 ± 3.5"],
            ["wit (0.2, 0.8)", "61.0 ± 3.0", "53.0 ± 4.0", "57.0 ± 2.5", "+2.0 ± 3.5"],
            ["it (0, 1)", "60.0 ± 3.0", "50.0 ± 4.0", "55.0 ± 2.5", ""],
            ["base", "20.0 ± 3.0", "10.0 ± 4.0", "15.0 ± 2.5", "-40.0 ± 3.5"],
        ],
    )
    assert metrics.summary == (
        "it (0, 1) averages 40.0 points above base (standard error of the difference 3.5): more than two "
        "standard errors. wit (0.2, 0.8) averages 2.0 points above it (0, 1) (standard error of the "
        "difference 3.5): within two standard errors, so no difference is shown. dpo from wit averages 30.0 "
        "points above it (0, 1) (standard error of the difference 3.5): more than two standard errors."
    )


def test_ties_are_marked_and_the_best_is_bold(make: Make) -> None:
    inputs = {key: step for key, step in world().items() if "dpo" not in key}
    context = make(inputs)
    run(context)
    text = (context.out / "report.md").read_text()
    # know: 61 is best, 60 is 1 below it with an error of 4.24; base is far below.
    assert "| wit (0.2, 0.8) | **61.0 ± 3.0** | **53.0 ± 4.0** | **57.0 ± 2.5** | +2.0 ± 3.5 |" in text
    assert "| it (0, 1) | 60.0 ± 3.0 ≈ | 50.0 ± 4.0 ≈ | 55.0 ± 2.5 ≈ |  |" in text
    assert "| base | 20.0 ± 3.0 | 10.0 ± 4.0 | 15.0 ± 2.5 | -40.0 ± 3.5 |" in text


def samples(folder: Path, scores: list[int]) -> Path:
    """Write a sample file with these item scores."""
    folder.mkdir()
    lines = [{"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": s} for i, s in enumerate(scores)]
    (folder / "samples_know.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_same_items_give_a_paired_error(make: Make, tmp_path: Path) -> None:
    one = samples(tmp_path / "one", [1, 1, 0, 0])
    two = samples(tmp_path / "two", [1, 1, 1, 0])
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row("know", 0.5, 0.2887)], one),
        "bench[wit]": bench("wit", sft("wit", 0.2, 0.8), [row("know", 0.75, 0.25)], two),
    }
    # Differences 0, 0, 1, 0: mean 1/4, variance (3/16 + 9/16) / 3 = 1/4, error sqrt(1/4 / 4) = 1/4.
    assert table_rows(make(inputs))[0][-1] == "+25.0 ± 25.0"
    # Three items are shared, with the residuals (-1/2, -1/2, 1/2) and (1/4, 1/4, 1/4) times sqrt(4/3) / 4; the fourth
    # items, 1/2 and 3/4, are independent: sqrt(4/3 (2/16 + 9/16 + 4/16 + 9/16) / 16) = 0.354.
    text = (two / "samples_know.jsonl").read_text()
    (two / "samples_know.jsonl").write_text(text.replace('"h3', '"other'))
    assert table_rows(make(inputs))[0][-1] == "+25.0 ± 35.4"
    # Other items, or scores that are no mean of items, cannot be paired: sqrt(28.87^2 + 25^2) = 38.2.
    (two / "samples_know.jsonl").write_text(text.replace('"h', '"other'))
    assert table_rows(make(inputs))[0][-1] == "+25.0 ± 38.2"


def test_what_was_not_measured_is_a_dash_and_is_not_averaged(make: Make) -> None:
    inputs = world()
    inputs["bench[wit]"] = with_scores(inputs["bench[wit]"], [row("know", 0.61, 0.03)])
    metrics = run(make(inputs))
    assert metrics.table
    assert metrics.summary
    assert [row[0] for row in metrics.table.rows] == ["dpo from wit", "it (0, 1)", "base", "wit (0.2, 0.8)"]
    assert metrics.table.rows[3] == ["wit (0.2, 0.8)", "61.0 ± 3.0", "–", "–", "–"]  # noqa: RUF001
    assert "wit (0.2, 0.8) and it (0, 1) were not measured on the same benchmarks." in metrics.summary


def test_equal_averages_stay_in_the_recipes_order(make: Make) -> None:
    """0.1 + 0.2 and 0.3 + 0 are the same but for floating point."""
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row("know", 0.3), row("reason", 0.0)]),
        "bench[wit]": bench("wit", sft("wit", 1, 1), [row("know", 0.1), row("reason", 0.2)]),
    }
    assert [row[0] for row in table_rows(make(inputs))] == ["it (0, 1)", "wit (1, 1)"]


def test_without_standard_errors_nothing_is_claimed(make: Make) -> None:
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row("know", 0.5)]),
        "bench[wit]": bench("wit", sft("wit", 1, 1), [row("know", 0.75)]),
    }
    metrics = run(make(inputs))
    assert metrics.table
    assert metrics.table.rows == [
        ["wit (1, 1)", "75.0", "75.0", "+25.0"],
        ["it (0, 1)", "50.0", "50.0", ""],
    ]
    assert metrics.summary
    assert "the difference can be chance" in metrics.summary


def test_a_metric_that_is_no_share_stays_in_its_unit_and_out_of_the_average(make: Make) -> None:
    loss = {"metric": "perplexity", "higher_is_better": False}
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row("know", 0.5, 0.1), row("text", 12.345, 0.5, **loss)]),
        "bench[wit]": bench("wit", sft("wit", 1, 1), [row("know", 0.5, 0.1), row("text", 8.0, None, **loss)]),
    }
    context = make(inputs)
    assert table_rows(context)[0] == ["it (0, 1)", "50.0 ± 10.0", "12.35 ± 0.5", "50.0 ± 10.0", ""]
    text = (context.out / "report.md").read_text()
    assert "| **8** |" in text, "lower is better"
    assert "Left out, being no share of which more is better: text." in text


def chrf(value: float) -> ScoreRow:
    """chrF goes from 0 to 100."""
    return row("translate", value, 0.01, metric="chrf")


def test_the_scale_comes_from_the_metric_and_not_from_its_values(make: Make) -> None:
    """A chrF of 0.05 is no share, whatever the other models have; `metrics` makes it one of 100."""
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row("know", 0.5, 0.1), chrf(0.05)]),
        "bench[wit]": bench("wit", sft("wit", 1, 1), [row("know", 0.6, 0.1), chrf(0.08)]),
    }
    third = {"bench[base]": bench("base", Input(Path()), [row("know", 0.1, 0.1), chrf(41.0)])}
    for steps in (inputs, inputs | third):
        for metrics, expected in (
            ({}, {"it (0, 1)": ["50.0 ± 10.0", "0.05 ± 0.01", "50.0 ± 10.0"]}),
            ({"chrf": {"scale": 100}}, {"wit (1, 1)": ["60.0 ± 10.0", "0.1 ± 0.0", "30.0 ± 5.0"]}),  # (60 + 0.08) / 2
        ):
            table = {cells[0]: cells[1:4] for cells in table_rows(make(steps, metrics=metrics))}
            for name, cells in expected.items():
                assert [cell.removesuffix(" ≈") for cell in table[name]] == cells


def test_a_known_metric_outside_its_range_is_an_error_that_names_the_remedy(make: Make) -> None:
    inputs = {"bench[it]": bench("it", sft("it", 0, 1), [row("percent", 63.0, 1.0)])}
    with pytest.raises(UserError, match=r"percent: acc is 63, but should be from 0 to 1; .*\{acc: \{scale: 100\}\}"):
        run(make(inputs))
    assert table_rows(make(inputs, metrics={"acc": {"scale": 100}})) == [["it (0, 1)", "63.0 ± 1.0", "63.0 ± 1.0", ""]]
    assert table_rows(make(inputs, metrics={"acc": {"scale": None}})) == [["it (0, 1)", "63 ± 1"]]


def test_scores_without_a_share_are_not_called_other_benchmarks(make: Make) -> None:
    inputs = {
        f"bench[{name}]": bench(name, sft(name, prompt, 1), [chrf(value)])
        for name, prompt, value in (("it", 0, 30.0), ("wit", 0.5, 31.0))
    }
    summary = run(make(inputs)).summary
    assert summary
    assert "no average to compare" in summary
    assert "same benchmarks" not in summary


def test_another_models_benchmark_changes_no_average(make: Make) -> None:
    """A second stage scores `wit` alone: `it` keeps its average, and the two averages are not compared."""
    more = bench("wit", sft("wit", 0.2, 0.8), [row("extra", 0.9, 0.02)])
    table = {cells[0]: cells for cells in table_rows(make(world() | {"more[wit]": more}))}
    assert table["it (0, 1)"][1:] == ["60.0 ± 3.0", "50.0 ± 4.0", "–", "55.0 ± 2.5 (of 2)", ""]  # noqa: RUF001
    # (61 + 53 + 90) / 3 = 68, sqrt(3^2 + 4^2 + 2^2) / 3 = 1.8
    assert table["wit (0.2, 0.8)"][1:] == ["61.0 ± 3.0", "53.0 ± 4.0", "90.0 ± 2.0", "68.0 ± 1.8 (of 3)", "–"]  # noqa: RUF001


def test_csv_keeps_every_digit_and_the_sft_weights_of_a_dpo_model(make: Make) -> None:
    inputs = world()
    first, *others = inputs["bench[dpo]"].metrics.results or []
    exact = first.model_copy(update={"value": 0.1 + 0.2})
    inputs["bench[dpo]"] = with_scores(inputs["bench[dpo]"], [exact, *others])
    context = make(inputs)
    run(context)
    with (context.out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("recipe", "step", "model", "stage", "prompt_weight", "completion_weight", "seed"),
        *("task", "metric", "value", "stderr"),
    ]
    assert len(lines) == 12
    assert list(lines[0].values()) == [
        "tiny",
        "bench[base]",
        "base",
        "base",
        "",
        "",
        "",
        "know",
        "acc",
        "0.2",
        "0.03",
    ]
    dpo = lines[9]
    assert list(dpo.values())[1:7] == ["bench[dpo]", "dpo", "dpo", "0.2", "0.8", "23"]
    assert float(dpo["value"]) == 0.1 + 0.2
    assert lines[11]["stderr"] == ""


EVIL = [
    "<script>alert('x|y')</script>",
    '"onmouseover="alert(1)',
    "]]><b>",
    "</style></title><i>",
    "\x1b[2J\x00\x08 $\\x$",
]


class Attributes(HTMLParser):
    """Every attribute of a page, as a browser reads it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs


@pytest.mark.parametrize("evil", EVIL)
def test_names_are_shown_and_never_run(make: Make, evil: str) -> None:
    """Names of the recipe, a model, a task and a metric; also characters that XML cannot hold."""
    inputs = {
        "bench[it]": bench("it", sft("it", 0, 1), [row(evil, 0.5, 0.1), row("a_b*c", 0.5, 0.1)]),
        f"bench[{evil}]": bench(evil, Input(Path()), [row(evil, 0.4, 0.1), row("a_b*c", 0.5, 0.1, metric=evil)]),
    }
    context = make(inputs, recipe=evil, title=evil)
    run(context)
    plain = make(world(), recipe="tiny")
    run(plain)
    tags = [re.findall(r"<[a-z!/][^>]*", (c.out / "report.html").read_text()) for c in (context, plain)]
    assert {tag.split()[0] for tag in tags[0]} <= {tag.split()[0] for tag in tags[1]} | {"<span", "</span"}
    attributes = Attributes((context.out / "report.html").read_text()).attributes
    assert not any(name.startswith("on") for name, _ in attributes)
    assert all(value and value.startswith("../") for name, value in attributes if name == "href")
    assert (tags[0].count("</style"), tags[0].count("</title")) == (1, 1)
    root = ElementTree.parse(context.out / "figures" / "scores.svg").getroot()
    assert not {node.tag.rpartition("}")[2] for node in root.iter()} & {"script", "b", "i"}
    assert not any(name.startswith("on") for node in root.iter() for name in node.attrib)
    text = (context.out / "report.md").read_text()
    assert "\x1b" not in text
    assert not re.search(r"<(script|b|i|/style)\b", text)
    assert r"a_b\*c" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\x1b[2J", '"\n=1', "a,b"])
def test_a_spreadsheet_takes_no_name_for_a_formula(make: Make, evil: str) -> None:
    inputs = {f"bench[{evil}]": bench(evil, Input(Path()), [row(evil, -0.5, 0.1, metric=evil)])}
    context = make(inputs, recipe=evil)
    run(context)
    with (context.out / "results.csv").open(newline="") as file:
        _, cells = csv.reader(file)
    texts = [cell for cell in cells if not re.fullmatch(r"-?[\d.]*", cell)]
    assert len(texts) >= 4
    assert not any(re.match(r"[=+\-@\t\r]|.*[\x00-\x08\x0b-\x1f]", cell) for cell in texts)
    assert "-0.5" in cells


def test_the_page_fetches_nothing(make: Make) -> None:
    context = make(world())
    run(context)
    page = (context.out / "report.html").read_text()
    assert not re.search(r"""src\s*=\s*["'](?!data:)|href\s*=\s*["'](?!\.\./)|https?:|@import|url\(""", page)
    assert (context.out / "figures" / "scores.svg").read_bytes().startswith(b"<?xml")
    assert sorted(p.name for p in context.out.iterdir()) == [
        "figures",
        "report.html",
        "report.md",
        "results.csv",
        "tables.tex",
    ]


def test_preference_tuning_beside_its_starts(make: Make) -> None:
    """it 55 -> 60, wit 57 -> 85; every difference has the error 3.54 of test_the_main_table_by_hand."""
    it_dpo = Input(Path(), "it_dpo", "dpo", config={"seed": 23, "model": "it"}, inputs={"model": sft("it", 0, 1)})
    inputs = world()
    inputs["bench[it_dpo]"] = bench("it_dpo", it_dpo, [row("know", 0.65, 0.03), row("reason", 0.55, 0.04)])
    context = make(inputs)
    run(context)
    text = (context.out / "report.md").read_text()
    assert "| model | its start | after | change | against the one from IT |" in text
    assert "| dpo from wit | wit (0.2, 0.8): 57.0 ± 2.5 | 85.0 ± 2.5 | +28.0 ± 3.5 | +25.0 ± 3.5 |" in text
    assert "| it\\_dpo from it | it (0, 1): 55.0 ± 2.5 | 60.0 ± 2.5 | +5.0 ± 3.5 |  |" in text.replace(
        "it_dpo", r"it\_dpo"
    )


def test_sensitivity_against_conventional_tuning(make: Make) -> None:
    less = {"metric": "posix", "higher_is_better": False}
    inputs = {
        f"posix[{name}]": replace(bench(name, start, [row("open", value, 0.1, **less)]), kind="sensitivity")
        for name, start, value in (
            ("base", Input(Path()), 5.0),
            ("it", sft("it", 0, 1), 2.0),
            ("wit", sft("wit", 0.2, 0.8), 1.5),
        )
    }
    context = make(inputs)
    run(context)
    text = (context.out / "report.md").read_text()
    assert "| model | open | open against IT |" in text
    assert "| base | 5 ± 0.1 | +150.0 % |" in text
    assert "| wit (0.2, 0.8) | 1.5 ± 0.1 | -25.0 % |" in text


def test_latex_shows_what_is_meant(make: Make) -> None:
    """Another library reads every cell back, and each row has as many cells as the table has columns."""
    from pylatexenc.latex2text import LatexNodes2Text

    evil = r"\input{/etc/passwd} $x_1$ 50% & more # ~ ^ {a} -- \\ <b> | ± ≈"
    shown = LatexNodes2Text().latex_to_text(latex_text(evil))
    assert re.sub(r"\s", "", shown).replace("ˆ", "^") == re.sub(r"\s", "", evil)  # noqa: RUF001 (its circumflex)
    context = make(world() | {"bench[x]": bench(evil, Input(Path()), [row(evil, 0.4, 0.1)])})
    run(context)
    text = (context.out / "tables.tex").read_text()
    assert r"\input" not in text
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table[0]) - 1}
    assert r"& \textbf{80.0 $\pm$ 3.0} &" in text


def test_the_same_inputs_give_the_same_bytes(make: Make) -> None:
    contexts = [make(world()), make(world())]
    for context in contexts:
        run(context)
    first, second = ({p.relative_to(c.out): p.read_bytes() for p in c.out.rglob("*") if p.is_file()} for c in contexts)
    assert first == second


def test_the_baseline_is_the_conventional_model_or_the_one_named(make: Make) -> None:
    inputs = {
        f"bench[{name}]": bench(name, sft(name, *weights), [row("know", 0.5, 0.1)])
        for name, weights in (("prompts", (1.0, 0.0)), ("low", (0.0, 0.4)), ("it", (0.0, 1.0)))
    }
    models = read_results(inputs).models
    default, named = find_baseline(models, None), find_baseline(models, "low")
    assert default is not None
    assert named is not None
    assert (default.name, named.name) == ("it", "low")
    with pytest.raises(UserError, match="'gone' is in no benchmark; evaluated are prompts, low, it"):
        run(make(inputs, baseline="gone"))
    del inputs["bench[it]"], inputs["bench[low]"]
    metrics = run(make(inputs))
    assert metrics.table
    assert metrics.table.columns == ["model", "know", "average"]
    assert metrics.summary
    assert metrics.summary.startswith("No conventionally tuned model")


def test_config() -> None:
    assert ReportStage().needs() == {"": Need("steps", "*", "benchmarks")}
    assert ReportStage(benchmarks=["a", "b"]).needs()["b"] == Need("steps", "b", "benchmarks.1")
    with pytest.raises(ValidationError, match="named more than once: a"):
        ReportStage(benchmarks=["a", "a"])
