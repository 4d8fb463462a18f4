"""The report's page in Chromium, on a screen and on a phone, light and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stages.base import Context, Input
from stages.report.config import PUBLISHED, ReportStage
from stages.report.stage import run
from tests.stages.report.test_grid import grid
from tests.stages.report.test_published import FIGURE
from tests.stages.report.test_report import with_scores, world

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SCORES = "h2:text-is('Scores') ~ .scroll"
ARTEFACTS = Path(__file__).resolve().parents[3] / "artifacts"
"""The folder of screenshots, for people to look at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "these tests need Chromium (Debian: apt install chromium)"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a grid, a published one, models tuned on preferences, and a title that is an attack."""
    out = tmp_path_factory.mktemp("runs") / "small" / "report"
    out.mkdir(parents=True)
    evil = "<img src=x onerror=alert(1)>"
    inputs: dict[str, Any] = {**world(), **grid(), PUBLISHED: Input(FIGURE)}
    for name, step in inputs.items():  # an average needs the same benchmarks for all
        inputs[name] = with_scores(step, [row for row in step.metrics.results or [] if row.task == "know"])
    for name in ("bench[base]", "bench[it]"):
        folder = out.parent / name
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps({"step": name}))
    config = ReportStage(title=evil, model_name="Llama-3-1B", data_name="LIMA", published="figure1.csv")
    run(Context("small", "report", config, inputs, out, out, out, out, lambda *_: None))
    return out / "report.html"


@pytest.fixture(params=[(1200, "light"), (390, "dark")], ids=["screen", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, page_file: Path) -> Iterator[tuple[Page, list[str]]]:
    """The open page, and its messages and requests."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    events: list[str] = []
    opened.on("console", lambda message: events.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: events.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: events.append(request.url) if not request.url.startswith("data:") else None)
    opened.goto(page_file.as_uri())
    yield opened, events
    opened.close()


def test_it_loads_nothing_and_logs_nothing(page: tuple[Page, list[str]], page_file: Path) -> None:
    _, events = page
    assert events == [page_file.as_uri()]


def test_its_policy_forbids_every_load_and_foreign_script(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    """Even if a name got into the page unescaped."""
    attacks = [
        "<script>document.title = 'attacked'</script>",
        "<img src='x' onerror='document.title = 1'>",
        "<img src='http://127.0.0.1:9/x.png'>",
        "<iframe src='http://127.0.0.1:9/'></iframe>",
        "<link rel='stylesheet' href='http://127.0.0.1:9/x.css'>",
        "<style>h1 { display: none }</style>",
        "<form action='http://127.0.0.1:9/'><button id='send'>x</button></form>",
    ]
    text = page_file.read_text()
    assert text.count("</main>") == 1
    (tmp_path / "page.html").write_text(text.replace("</main>", "".join(attacks) + "</main>"))
    opened = browser.new_page()
    blocked: list[str] = []
    opened.on("console", lambda message: blocked.append(message.text))
    opened.goto((tmp_path / "page.html").as_uri())
    opened.dispatch_event("#send", "click")
    opened.wait_for_timeout(500)
    assert "attacked" not in opened.title()
    assert opened.is_visible("h1")
    assert opened.url == (tmp_path / "page.html").as_uri()
    assert len([text for text in blocked if "violates the following Content Security Policy" in text]) >= len(attacks)
    opened.close()


def test_it_fits(page: tuple[Page, list[str]], request: pytest.FixtureRequest) -> None:
    """Wide tables scroll, the page does not; all pictures show; saves a screenshot."""
    opened, _ = page
    assert opened.evaluate("document.documentElement.scrollWidth") == opened.evaluate("innerWidth")
    widths = opened.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert len(widths) >= 3
    assert all(natural > 100 and shown > 100 for natural, shown in widths)
    ARTEFACTS.mkdir(exist_ok=True)
    opened.screenshot(path=ARTEFACTS / f"report-{request.node.callspec.id}.png", full_page=True)


def test_it_follows_the_readers_colours(page: tuple[Page, list[str]], request: pytest.FixtureRequest) -> None:
    opened, _ = page
    colours = opened.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (ink > paper) == (request.node.callspec.id == "phone")
    assert abs(ink - paper) > 450


def test_a_click_sorts_a_table(page: tuple[Page, list[str]]) -> None:
    """By number, largest first, missing ones last; a second click reverses the order."""
    opened, _ = page
    table = opened.locator(f"{SCORES} table").first
    head = table.locator("thead button", has_text="know")

    def column() -> list[str]:
        return table.locator("tbody tr td:nth-child(2)").all_inner_texts()

    head.click()
    sizes = [float(text.split(" ")[0]) for text in column()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 4
    head.click()
    assert [float(text.split(" ")[0]) for text in column()] == sizes[::-1]
    assert head.locator("xpath=..").get_attribute("aria-sort") == "ascending"
    table.locator("thead button").last.click()  # "vs it", which has no number for it itself
    assert table.locator("tbody tr").last.locator("th").inner_text().startswith("it")


def test_a_number_links_to_its_manifest(page: tuple[Page, list[str]], page_file: Path) -> None:
    opened, _ = page
    opened.locator(f"{SCORES} tbody tr", has_text="it (0, 1)").locator("a").first.click()
    assert opened.url == (page_file.parents[1] / "bench[it]" / "stage.json").as_uri().replace("[", "%5B")
    assert json.loads(opened.locator("body").inner_text()) == {"step": "bench[it]"}
