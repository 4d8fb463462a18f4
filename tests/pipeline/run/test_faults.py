"""What befalls a run: two at once, kills while publishing, damaged results, full disks. Real processes, real files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stages.system.integrity import content_hash
from tests.pipeline.run.test_command import (
    RECIPE,
    STEPS,
    command,
    environment,
    plan,
    states,
    to_go_on,
    to_run,
    write_world,
)

pytestmark = pytest.mark.long

CALL = [sys.executable, "-P", "-m", "pipeline.cli"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    call = [*CALL, "r.yaml", *arguments]
    return subprocess.Popen(
        call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_until(condition: Iterator[bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not next(condition):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def checkpoint_sealed(folder: Path) -> Iterator[bool]:
    while True:
        yield any((folder / "runs/store/unfinished").glob("*/checkpoints/*/sealed.json"))


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    call = [*CALL, "--verify", "runs"]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environment(), check=False)


def digests(folder: Path) -> dict[str, dict[str, str]]:
    """Step -> its files with their hashes, as published; of the report, which shows times, the CSV."""
    outputs = {name: json.loads((folder / "runs/small" / name / "stage.json").read_text())["outputs"] for name in STEPS}
    return outputs | {"report": {"results.csv": outputs["report"]["results.csv"]}}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder in which two runs of the whole recipe were started at the same moment, both to their end."""
    folder = tmp_path_factory.mktemp("two")
    write_world(folder, model_folder)
    both = [start(folder), start(folder)]
    for number, process in enumerate(both):
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, said + errors
        (folder / f"said-{number}.txt").write_text(said)
    return folder


@pytest.fixture
def world(computed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(computed, tmp_path / "world", symlinks=True)
    return tmp_path / "world"


# ------------------------------------------------------------------------------------------------- two at once


def test_two_runs_make_each_step_once(computed: Path) -> None:
    said = [(computed / f"said-{number}.txt").read_text() for number in (0, 1)]
    done = [re.findall(r"done +(\S+)", text) for text in said]
    assert sorted(done[0] + done[1]) == sorted(STEPS)
    assert any("another run is computing it" in text for text in said)
    assert "0 problems" in verify(computed).stdout
    assert not list((computed / "runs" / "store" / "unfinished").iterdir())


def test_a_waiting_run_takes_over_from_one_that_is_killed(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    arguments = ("--set", "stages.it.train.max_steps=400", "--set", "stages.it.train.save_steps=20", "--stage", "it")
    first = start(tmp_path, *arguments)
    wait_until(checkpoint_sealed(tmp_path), first)
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path, *arguments)
    assert second.stdout
    waits = next(line for line in second.stdout if "another run is computing it" in line)
    holder = rf"another run is computing it: process {first.pid} on {socket.gethostname()}, since 2\d\d\d-"
    assert re.search(holder, waits)
    first.kill()
    said, errors = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode == 0, said + errors
    assert "resumed from step" in said


def test_a_step_that_waits_for_a_stopped_worker_says_for_whom_and_since_when(
    tmp_path: Path, model_folder: Path
) -> None:
    write_world(tmp_path, model_folder)
    arguments = ("--set", "stages.it.train.max_steps=400", "--set", "stages.it.train.save_steps=20", "--stage", "it")
    first = start(tmp_path, *arguments)
    wait_until(checkpoint_sealed(tmp_path), first)
    children = psutil.Process(first.pid).children(recursive=True)
    (worker,) = (child.pid for child in children if "pipeline.run.worker" in child.cmdline())
    os.kill(worker, signal.SIGSTOP)
    first.kill()
    first.communicate()
    second = start(tmp_path, *arguments)

    def says_so() -> Iterator[bool]:
        while True:
            record = json.loads((tmp_path / "runs/small/run.json").read_text())
            _, _, note = next(step["progress"] for step in record["steps"] if step["step"] == "it") or (0, 0, "")
            waits = (
                rf"waits for another worker of this step: process {worker} on {socket.gethostname()}, since 2\d\d\d-"
            )
            yield bool(re.match(waits, note))

    wait_until(says_so(), second)
    os.kill(worker, signal.SIGCONT)
    said, errors = second.communicate(timeout=120)
    assert second.returncode == 0, said + errors


# ------------------------------------------------------------------------------------------- killed while publishing


def test_what_was_complete_when_its_run_was_killed_is_published(world: Path) -> None:
    """As if killed between writing the manifest and the rename: what is there is whole, and not made again."""
    link = world / "runs" / "small" / "dpo"
    place, before = link.resolve(), json.loads((link / "stage.json").read_text())
    half = world / "runs" / "store" / "unfinished" / place.name
    half.mkdir(parents=True)
    place.rename(half / "out")
    done = command(world)
    assert done.returncode == 0, done.stdout
    assert states(world)["dpo"] == "cached"
    assert json.loads((link / "stage.json").read_text()) == before
    assert not half.exists()


def test_what_was_half_made_is_swept_away(world: Path) -> None:
    left = world / "runs" / "store" / "unfinished" / ("0" * 32)
    for name in ("out", "scratch", "checkpoints/checkpoint-7"):
        (left / name).mkdir(parents=True)
        (left / name / "model.safetensors").write_bytes(b"half")
    assert command(world).returncode == 0
    assert [place.name for place in left.iterdir()] == ["checkpoints"], "which another recipe may want"
    assert verify(world).returncode == 0


# ----------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on(world: Path, sent: signal.Signals) -> None:
    """Ctrl-C, or being asked to end: exit 130 within 5 s, no worker left; then on from the last checkpoint."""
    arguments = ("--set", "stages.it.train.max_steps=400", "--set", "stages.it.train.save_steps=10", "--stage", "it")
    (world / "runs" / "small" / "logs" / "it.txt").unlink()
    process = start(world, *arguments)
    kept = world / "runs" / "store" / "unfinished"
    wait_until(checkpoint_sealed(world), process)
    process.send_signal(sent)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert states(world)["it"] == "interrupted"
    assert [place.name for place in kept.glob("*/*")] == ["checkpoints"]
    done = command(world, *to_go_on(errors))
    assert done.returncode == 0
    assert "resumed from step" in done.stdout


# ------------------------------------------------------------------------------------------------------ corruption


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": (lambda file: flip(file), "was changed after it was written"),
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), "was changed after it was written"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


def test_damaged_files_are_named_and_made_again(world: Path) -> None:
    damaged = {
        "it/tokenizer.json": "missing",
        "wit/model.safetensors": "flipped",
        "dpo/model.safetensors": "truncated",
        "bench[it]/results.json": "flipped",
    }
    before = digests(world)
    for name, damage in damaged.items():
        DAMAGES[damage][0](world / "runs" / "small" / name)
    planned, verified = plan(world), verify(world)
    assert verified.returncode == 1
    for name, damage in damaged.items():
        step, _, file = name.partition("/")
        expected = DAMAGES[damage][1]
        assert planned[step]["why"] == f"its result is damaged: {file} {expected}"
        assert re.search(rf"\({re.escape(step)}\): {re.escape(file)} {expected}", verified.stdout)
    done = command(world)
    assert done.returncode == 0, done.stdout
    again = {name.partition("/")[0] for name in damaged}
    assert states(world) == {step: "done" if step in again else "cached" for step in STEPS}
    assert digests(world) == before
    assert verify(world).returncode == 0


def test_damaged_manifests_are_named(world: Path) -> None:
    manifests = {
        damage: world / "runs" / "small" / f"bench[{model}]" / "stage.json"
        for damage, model in zip(DAMAGES, ("base", "it", "wit"), strict=True)
    }
    for manifest in manifests.values():
        os.truncate(manifest, manifest.stat().st_size - 1)  # which is a line's end, and no harm
    assert not to_run(world)
    for damage, manifest in manifests.items():
        DAMAGES[damage][0](manifest)
    damaged = {manifest.parent.name for manifest in manifests.values()}
    planned, said = plan(world), verify(world).stdout
    for step in damaged:
        assert "its result is damaged: stage.json" in planned[step]["why"]
    assert said.count("stage.json") >= len(damaged)
    assert command(world).returncode == 0
    assert {step for step, state in states(world).items() if state == "done"} == damaged


def test_what_only_the_disk_changed_is_found_before_it_is_used(world: Path) -> None:
    """The file's times and size say that nothing happened, and its remembered hash is the right one."""
    weights = (world / "runs" / "small" / "wit" / "model.safetensors").resolve()
    flip(weights)
    stat, memory = weights.stat(), world / "runs" / "cache" / "hashes.json"
    known = json.loads(memory.read_text())["hashes"] if memory.exists() else {}
    right = json.loads((weights.parent / "stage.json").read_text())["outputs"][weights.name]
    known[str(world / "runs/store/sft" / weights.parent.name / weights.name)] = known["runs-relative"] = [
        [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino],
        right,
    ]
    memory.parent.mkdir(exist_ok=True)
    memory.write_text(json.dumps({"sha256": content_hash(known), "hashes": known}))
    assert plan(world)["wit"]["state"] == "cached", "it can be seen only by reading all of it"
    refused = command(world, "--stage", "dpo")
    assert refused.returncode == 2
    assert "dpo needs wit: its result is damaged: model.safetensors was changed" in refused.stderr
    done = command(world, "--from", "dpo")
    assert done.returncode == 2, "wit was not selected"
    done = command(world, "--force", "dpo")
    assert done.returncode == 0
    assert states(world)["wit"] == "done"
    assert verify(world).returncode == 0


def test_a_damaged_cache_is_not_used(world: Path) -> None:
    """The prepared rows: a bit that flips in them is noticed, and they are prepared anew."""
    before = digests(world)
    (arrow, *_) = (world / "runs" / "cache" / "prepared").glob("*/*.arrow")
    flip(arrow)
    assert arrow.name in verify(world).stdout
    done = command(world, "--force", "it", "--force", "wit", "--force", "dpo")
    assert done.returncode == 0
    assert digests(world) == before
    assert verify(world).returncode == 0


def test_verify_tells_what_is_missing(world: Path) -> None:
    assert verify(world).stdout.strip().endswith(" 0 problems")
    (world / "runs" / "small" / "it" / "notes.txt").write_text("mine")
    place = (world / "runs" / "small" / "wit").resolve()
    shutil.rmtree(place)
    verified = verify(world)
    assert verified.returncode == 1
    assert "(it): notes.txt was added after the result was published" in verified.stdout
    assert f"(dpo): was computed from wit ({place.name}), which is missing" in verified.stdout
    assert "runs/small/wit: points to" not in verified.stdout
    assert re.search(r"^small/wit: points to .* which is missing", verified.stdout, re.MULTILINE)
    values = json.loads(
        subprocess.run(
            [*CALL, "--verify", "runs", "--json"], cwd=world, capture_output=True, env=environment(), check=False
        ).stdout
    )
    assert values["steps"] == len(STEPS) - 1
    assert {problem["path"].rpartition(" ")[2] for problem in values["problems"]} >= {"(it)", "(dpo)", "small/wit"}


# ------------------------------------------------------------------------------------------- full, read-only, too few


def in_small_disk(folder: Path, script: str, kilobytes: int = 300) -> str:
    """What `script` says, run in `folder` with a small file system mounted at its folder `small`."""
    (folder / "small").mkdir(exist_ok=True)
    run = f"{sys.executable} -P -m pipeline.cli r.yaml --runs small/runs"
    lines = f"set -e; mount -t tmpfs -o size={kilobytes}k none small; run() {{ {run} $@ || echo rc $?; }}; {script}"
    rights = ["--user", "--map-root-user"] if os.geteuid() else []
    call = ["unshare", *rights, "--mount", "bash", "-c", lines]
    done = subprocess.run(
        call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("kilobytes", [420, 560])
def test_a_full_disk(tmp_path: Path, model_folder: Path, kilobytes: int) -> None:
    """With room for the weights of all models, but not for all that is written: every error says so, whether it came
    from training, a library, the log or publishing; what is published stays whole, and with room it goes on."""
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("models: [base, it, wit, dpo]", "models: [dpo]"))
    said = in_small_disk(
        tmp_path,
        "run; echo ---; "
        f"{sys.executable} -P -m pipeline.cli --verify small/runs; mount -o remount,size=50m small; echo ---; run",
        kilobytes,
    )
    full, verified, room = said.split("---")
    errors = re.findall(r"^ +failed .*|^run-recipe: .*", full, re.MULTILINE)
    assert errors
    for error in errors:
        assert re.search(
            r" is full \(.*; free some space and repeat the command: it continues where it stopped$", error
        )
    assert "rc 1" in full
    assert "0 problems" in verified
    assert "rc " not in room
    assert re.search(r"5 steps, [0-4] cached", room)


def test_a_read_only_folder(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    said = in_small_disk(tmp_path, "mount -o remount,ro small; run")
    assert "small/runs: cannot be used for results: its disk is read-only; name another folder by --runs" in said
    assert "rc 1" in said


def test_too_few_file_handles(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    said = in_small_disk(tmp_path, "ulimit -n 8; run")
    assert re.search(r"too many files are open at once \(.*\); raise the limit, see `ulimit -n`", said)
    assert "rc 1" in said
