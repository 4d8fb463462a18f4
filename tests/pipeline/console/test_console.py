"""What a person sees: the command on a real pseudo-terminal, drawn by a terminal emulator, and where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import dataclass
from pathlib import Path

import pyte
import pytest
from rich.console import Console as RichConsole
from rich.table import Table

from pipeline.console.console import Console
from pipeline.console.live_view import LiveView
from stages.records.run_record import Progress, StepRecord
from tests.pipeline.run.test_command import command, environment, write_world

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
CALL = [sys.executable, "-P", "-m", "pipeline.cli"]
COLUMNS, ROWS = 80, 24
RECIPE = """\
name: small
model: ./model
stages:
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: &train {max_steps: 5, per_device_train_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1}
  dpo:
    kind: dpo
    model: it
    data: {train: ./rows.jsonl, rejected: other_row}
    train: *train
  bench:
    kind: lm_eval
    models: [base, it, dpo]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  report: {kind: report}
"""


@dataclass
class Seen:
    """What was to be seen on a terminal."""

    screens: list[list[str]]
    """Its lines, whenever they had changed."""
    lines: list[str]
    """Those of the last screen, after those that had scrolled off it."""
    written: bytes
    status: int


def on_terminal(folder: Path, *arguments: str, **variables: str) -> Seen:
    """`run-recipe ARGUMENTS` on a terminal of 80 x 24."""
    screen = pyte.HistoryScreen(COLUMNS, ROWS, history=1000)
    stream = pyte.ByteStream(screen)
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    around = {
        name: value for name, value in environment().items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    }
    process = subprocess.Popen(
        [*CALL, *arguments],
        cwd=folder,
        stdin=its,
        stdout=its,
        stderr=its,
        env=around | {"TERM": "xterm-256color"} | variables,
    )
    os.close(its)
    written, screens = b"", [list(screen.display)]
    with contextlib.suppress(OSError):  # how Linux says that nobody has the terminal open any more
        while part := os.read(ours, 65536):
            written += part
            for frame in re.split(rb"(?=\r\x1b\[2K)", part):  # rich draws a view anew from its first line
                stream.feed(frame)
                if screen.display != screens[-1]:
                    screens.append(list(screen.display))
    os.close(ours)
    above = ["".join(line[column].data for column in range(COLUMNS)) for line in screen.history.top]
    lines = [line.rstrip() for line in [*above, *screen.display]]
    return Seen([[line.rstrip() for line in each] for each in screens], lines, written, process.wait())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("console")
    write_world(folder, model_folder)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def seen(world: Path) -> Seen:
    """The recipe run on a terminal, step by step."""
    screen = on_terminal(world, "r.yaml", "--jobs", "1")
    assert screen.status == 0, "\n".join(screen.lines)
    return screen


@pytest.mark.parametrize("step", ["it", "dpo"])
def test_a_running_training(seen: Seen, step: str) -> None:
    """Its bar, how far it is and how long it takes, and below that what the trainer says; then what waits."""
    bar = re.compile(rf"  run    {step} +\S+ +(\d)/5 0:\d\d:\d\d( 0:\d\d:\d\d left)?")
    note = re.compile(r" {9}loss \d+\.\d{3}, ([\d,]+) tokens/s(?:, [a-z ]+)?, memory (\d\.\d\d) GiB")
    moments = [
        (bar.match(line), note.match(screen[i + 1]), screen)
        for screen in seen.screens
        for i, line in enumerate(screen[:-1])
        if bar.match(line)
    ]
    drawn = "  logs: runs/small/logs/"  # the last line of a view; without it, this is one that was read half
    whole = [
        (count, said, screen) for count, said, screen in moments if count and said and count[2] and drawn in screen
    ]
    assert whole[-1][0][1] == "5", moments[-1:] or seen.lines
    for count, said, screen in whole:
        assert 0 < int(count[1]) <= 5
        assert int(said[1].replace(",", "")) > 0
        assert 0.1 < float(said[2]) < 8, "torch alone takes a tenth of a GiB"
        assert "  wait   bench[base]  lm_eval" in screen or "done   bench[base]" in "\n".join(screen)
        assert "  wait   report  report" in screen
        assert any(re.match(r"  \d of 6 steps done, 1 running, \d waiting", line) for line in screen), "\n".join(screen)


def test_what_is_left_on_the_terminal(seen: Seen) -> None:
    """A line for each step, the results and where the report lies: nothing of the view, nor of what libraries say."""
    text = "\n".join(seen.lines).strip()
    for step in ("it", "dpo", "bench[base]", "bench[it]", "bench[dpo]", "report"):
        assert len(re.findall(rf"^  done   {re.escape(step)} ", text, re.MULTILINE)) == 1, text
    assert not re.search(r"^  (run|wait) |logs:|[Ww]arning|it/s|examples/s|'loss'", text, re.MULTILINE), text
    assert text.endswith("report: runs/small/report/report.html")
    assert b"\x1b[?25h" in seen.written[seen.written.rindex(b"\x1b[?25l") :], "the cursor is shown again"


def test_libraries_are_heard_in_the_log(world: Path, seen: Seen) -> None:
    log = (world / "runs/small/logs/it.txt").read_text()
    assert "'loss'" in log
    assert "Writing model shards" in log


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_plain_lines_on_a_terminal(world: Path, seen: Seen, variables: dict[str, str]) -> None:
    screen = on_terminal(world, "r.yaml", "--stage", "report", **variables)
    assert screen.status == 0
    assert b"\x1b" not in screen.written
    assert b"\r" not in screen.written.replace(b"\r\n", b"\n")
    text = "\n".join(screen.lines)
    assert re.search(r"6 steps, 5 cached\nlogs: runs/small/logs/\n  run    report \(forced\)\n  done   report ", text)


def test_plain_lines_where_there_is_no_terminal(world: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if colour is requested, as CI services do, there is no view."""
    done = command(world, "--stage", "report")
    assert "\x1b" not in done.stdout
    assert re.search(r"^  run    report \(forced\)\n  done   report ", done.stdout, re.MULTILINE)
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = command(world, "--stage", "report")
    assert "\x1b[32mdone" in done.stdout
    assert not re.search("\x1b\\[\\??[0-9]*[^0-9;?m]", done.stdout), "no cursor is moved"


def test_names_are_whole_on_a_narrow_terminal(world: Path) -> None:
    """To be copied to --stage, however long they are."""
    long = "a-name-that-takes-nearly-half-of-it"
    recipe = (world / "r.yaml").read_text()
    (world / "long.yaml").write_text(recipe.replace("  it:", f"  {long}:").replace("model: it", f"model: {long}"))
    text = "\n".join(on_terminal(world, "long.yaml", "--set", f"stages.bench.models=[{long}]", "--plan").lines)
    assert re.search(rf"^ {long} +sft ", text, re.MULTILINE), text
    assert re.search(rf"^ bench\[{long}\] +lm_eval +(run|cached)", text, re.MULTILINE), text


def test_a_table_that_is_too_wide_is_told_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    wide = Table("step", *(f"column {i}" for i in range(20)))
    wide.add_row("wit", *("" if i % 2 else f"{i} MiB" for i in range(20)))
    console.rich.width = 80
    console.estimate([wide], ["a line"])
    assert capsys.readouterr().out.strip().startswith("wit: column 0 0 MiB, column 2 2 MiB, column 4 4 MiB")


def test_plain_lines_say_how_far_a_long_step_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console()
    console.progress("wit", Progress(1, 380, "loss 2.1"))
    assert capsys.readouterr().out == "", "not every step of it"
    monkeypatch.setattr("pipeline.console.console.PLAIN_SECONDS", 0.0)
    console.progress("wit", Progress(2, 380, "loss 2.0, 900 tokens/s"))
    assert capsys.readouterr().out == "  at     wit 2/380 loss 2.0, 900 tokens/s\n"


def test_rich_draws_with_the_lock_that_lines_take() -> None:
    """`live._lock` is private to rich: without it, or if drawing went on without it, lines would be erased."""
    view = LiveView(RichConsole(file=io.StringIO(), force_terminal=True))
    with view, view.live._lock:
        drawing = threading.Thread(target=view.live.refresh)
        drawing.start()
        drawing.join(0.3)
        assert drawing.is_alive()
    drawing.join(30)
    assert not drawing.is_alive()


def test_many_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first three are shown in full, with the end of their logs; the others by name."""
    console = Console()
    log = tmp_path / "logs" / "0.txt"
    log.parent.mkdir()
    log.write_text(
        "an old line\n\x1b[1;34mline\x1b[0m 0\n"
        + "\n".join(f"line {i}" for i in range(1, 5))
        + "\n\n0%\r 50%\r100%\nRuntimeError: 0\n"
    )
    for i in range(5):
        console.failed(f"cell[{i}]", f"RuntimeError: {i}", tmp_path / "logs" / f"{i}.txt", is_user_error=False)
    console.failed("cell[5]", "RuntimeError: 1", tmp_path / "logs" / "5.txt", is_user_error=False)
    output = capsys.readouterr().out.splitlines()
    assert output == [f"  failed cell[{i}]: RuntimeError: {[0, 1, 2, 3, 4, 1][i]}" for i in range(6)]
    states = ["failed"] * 6 + ["skipped"] * 2 + ["done"]
    records = [StepRecord(f"cell[{i}]", "sft", {}, state, None, None) for i, state in enumerate(states)]
    console.failures(records, "run-recipe r.yaml")
    text = capsys.readouterr().out
    assert text.startswith("\n6 failed: cell[0], cell[1], cell[2], cell[3], cell[4], cell[5]; 2 more need them\n")
    words = "".join(f"    line {i}\n" for i in range(5)) + "    100%\n"
    assert f"\n  failed cell[0]: RuntimeError: 0\n{words}    log: {log}\n" in text
    assert "failed cell[1] and 1 more: RuntimeError: 1\n" in text
    assert "failed cell[2]: RuntimeError: 2\n" in text
    assert "failed cell[3]" not in text
    assert f"and 2 more errors, with logs in the same folder: {log.parent}/" in text
    assert text.endswith("to continue with the steps that have no result:\n  run-recipe r.yaml\n")


def alone(folder: Path) -> str:
    done = subprocess.run(CALL, cwd=folder, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alone_it_lists_the_recipes_near_by(tmp_path: Path) -> None:
    files = {
        "mine.yml": "name: mine\nstages:\n  wit: {kind: sft}\n  dpo: {kind: dpo}\n",
        "recipes/told.yaml": "# run-recipe recipes/told.yaml\n#\n# Does this and\n# that. And more.\n\nstages: {}\n",
        "recipes/deep/child.yaml": "extends: ../told.yaml\n",
        "recipes/deep/tasks/too_deep.yaml": "stages: {}\n",
        "other.yaml": "services: {}\n",
        "list.yaml": "- stages\n",
        "broken.yaml": "stages: {it: [\n",
        "binary.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.yaml").write_bytes(b"stages: \xff\xfe")
    (tmp_path / "gone.yaml").symlink_to("nowhere.yaml")
    lines = alone(tmp_path).splitlines()
    assert lines[:3] == [
        "mine.yml                 name mine; stages wit, dpo",
        "recipes/told.yaml        Does this and that",
        "recipes/deep/child.yaml  extends ../told.yaml",
    ]
    assert lines[3] == ""
    assert "run-recipe --help" in lines[-1]
    (tmp_path / "empty").mkdir()
    assert alone(tmp_path / "empty").startswith("no recipe here or in recipes/: name one, run-recipe PATH")


def test_alone_it_lists_every_shipped_recipe_with_its_own_line() -> None:
    lines = alone(ROOT).split("\n\n")[0].splitlines()
    shipped = [path for path in (ROOT / "recipes").rglob("*.yaml") if "tasks" not in path.parts]
    assert {line.split()[0] for line in lines} == {str(path.relative_to(ROOT)) for path in shipped}
    assert all(len(line.split("  ", 1)[1].split()) > 3 for line in lines)


def test_help_fits_a_screen_and_its_examples_run(tmp_path: Path) -> None:
    variables = environment() | {"COLUMNS": str(COLUMNS)}
    said = subprocess.run([*CALL, "--help"], capture_output=True, text=True, env=variables, check=True).stdout
    lines = said.splitlines()
    assert len(lines) < ROWS
    assert max(map(len, lines)) <= COLUMNS
    examples = [re.split(r" {2,}", line.strip())[0] for line in lines if line.startswith("  run-recipe ")]
    assert len(examples) == 3
    for example in examples:
        words = shlex.split(example.replace("--preview 3", "--plan"))[1:]
        words += ["--runs", str(tmp_path / "runs"), *([] if "--plan" in words else ["--plan"])]
        done = subprocess.run([*CALL, *words], cwd=ROOT, capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, (example, done.stderr)
