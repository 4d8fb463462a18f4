"""A runs folder from somebody else can waste time; it deletes and overwrites nothing outside of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from stages.system.module_command import module_command
from tests.pipeline.run.test_command import environment

REPORT = "name: r\nstages:\n  report: {kind: report, runs: [other]}\n"
CALL = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious.txt").write_text("precious")
    (tmp_path / "r.yaml").write_text(REPORT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


@pytest.mark.parametrize(
    "link",
    [
        *("store", "store/unfinished", "store/unfinished/x", "store/unfinished/x/checkpoints/c/model.safetensors"),
        *("store/locks", "store/locks/x", "store/report", "store/report/x", "cache", "cache/prepared/x", "tmp"),
        *("r", "r/logs", "r/logs/report.txt", "r/report", "r/run.json", "other/run.json"),
    ],
)
@pytest.mark.parametrize("option", ["--plan", "--check", "--prefetch"])
def test_a_link_out_of_the_runs_folder_is_refused_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str], link: str, option: str
) -> None:
    make_link(folder / "runs" / link, folder / "victim")
    assert main(["r.yaml", option]) == 2
    assert f"runs/{link}: is a symbolic link to something else than a result" in capsys.readouterr().err
    assert [path.name for path in (folder / "victim").iterdir()] == ["precious.txt"]


def test_a_run_refuses_it_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_link(folder / "runs/store/unfinished/x", folder / "victim")
    assert main(["r.yaml"]) == 2
    assert "runs/store/unfinished/x: is a symbolic link" in capsys.readouterr().err
    assert (folder / "victim/precious.txt").read_text() == "precious"


def test_links_within_and_a_runs_folder_that_is_a_link_keep_working(folder: Path) -> None:
    (folder / "scratch").mkdir()
    (folder / "runs").symlink_to("scratch")
    for state in ("done", "cached"):
        done = subprocess.run(CALL, cwd=folder, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        assert f'"state": "{state}"' in (folder / "scratch/r/run.json").read_text()
    assert (folder / "runs/r/report").is_symlink()


def test_a_log_is_a_fresh_file(folder: Path) -> None:
    """Nor is a hard link written through."""
    log = folder / "runs/r/logs/report.txt"
    log.parent.mkdir(parents=True)
    os.link(folder / "victim/precious.txt", log)
    subprocess.run(CALL, cwd=folder, capture_output=True, env=environment(), check=True)
    assert (folder / "victim/precious.txt").read_text() == "precious"
    assert log.stat().st_nlink == 1
    assert log.read_text() != "precious"


def test_links_that_stay_inside_are_no_better(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link from the folder of unfinished steps to that of results would have all results deleted as left-overs."""
    subprocess.run(CALL, cwd=folder, capture_output=True, env=environment(), check=True)
    (folder / "runs/store/unfinished").rmdir()
    (folder / "runs/store/unfinished").symlink_to("report")
    results = sorted((folder / "runs/store/report").rglob("*"))
    assert main(["r.yaml", "--force", "report"]) == 2
    assert "runs/store/unfinished: is a symbolic link to something else than a result" in capsys.readouterr().err
    assert sorted((folder / "runs/store/report").rglob("*")) == results


def test_a_lock_with_a_second_name_is_not_written(folder: Path) -> None:
    done = subprocess.run([*CALL, "--json"], cwd=folder, capture_output=True, env=environment(), check=True)
    fingerprint = json.loads(done.stdout)["steps"][0]["fingerprint"]
    for name in (fingerprint, f"{fingerprint}.worker"):
        victim, lock = folder / "victim" / f"{name}.txt", folder / "runs/store/locks" / name
        victim.write_text("precious")
        lock.unlink(missing_ok=True)
        os.link(victim, lock)
    subprocess.run([*CALL, "--force", "report"], cwd=folder, capture_output=True, env=environment(), check=True)
    assert {file.read_text() for file in (folder / "victim").iterdir()} == {"precious"}


KINDS = {"run.json": "r/run.json", "stage.json": "store/report/*/stage.json", "hashes.json": "cache/hashes.json"}


@pytest.mark.parametrize(
    "content", ["pipe", "[" * 100_000, '{"a":' * 100_000, "[]", '{"steps": [{"state": []}]}', "null"]
)
@pytest.mark.parametrize("name", list(KINDS))
def test_a_file_of_the_store_that_is_none_hangs_and_crashes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    subprocess.run(CALL, cwd=folder, capture_output=True, env=environment(), check=True)
    (folder / "runs/cache").mkdir(exist_ok=True)
    files = list((folder / "runs").glob(KINDS[name])) or [folder / "runs" / KINDS[name]]
    for file in files:
        file.unlink(missing_ok=True)
        os.mkfifo(file) if content == "pipe" else file.write_text(content)
    (folder / "j.yaml").write_text("name: j\nstages:\n  report: {kind: report, runs: [r]}\n")
    for call in (["r.yaml", "--status"], ["r.yaml", "--plan"], ["j.yaml", "--plan"], ["--verify", "runs"], ["r.yaml"]):
        assert main(call) in (0, 1, 2)
        shown = capsys.readouterr()
        assert "internal error" not in shown.err
        assert "Traceback" not in shown.err


# ---------------------------------------------------------------------------------------------------- secrets


def logged(chunks: list[bytes], **variables: str) -> bytes:
    """What the log's process writes of these chunks."""
    call, base = module_command("pipeline.run.masked_log")
    with subprocess.Popen(call, env=base | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for chunk in chunks:
            os.write(process.stdin.fileno(), chunk)
            os.sched_yield()
        process.stdin.close()
        return process.stdout.read()


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        *[(name, "s3cr3t-0123456789", "s3cr3t-0123456789") for name in ("HF_TOKEN", "GITHUBTOKEN", "PGPASSWORD")],
        *[(name, "s3cr3t-0123456789", "s3cr3t-0123456789") for name in ("MY_SECRET_2", "OPENAI_API_KEY", "DB_PASS")],
        *[(name, "s3cr3t-0123456789", "s3cr3t-0123456789") for name in ("PGPASS", "MYSQL_PWD", "SSHPASS", "BEARER")],
        *[(name, "s3cr3t-0123456789", "s3cr3t-0123456789") for name in ("ACCESSKEY", "PRIVATE_KEY", "OPENAI_KEY2")],
        ("GIT_REMOTE", "https://s3cr3t-0123456789:x-oauth-basic@github.com/r", "s3cr3t-0123456789"),
        ("MIRRORS", "https://a:b@h/,https://b:s3cr3t-0123456789@h2/", "s3cr3t-0123456789"),
        ("ODD", "x://[@ http://a:s3cr3t-0123456789@h\u2100", "s3cr3t-0123456789"),
        ("DATABASE_URL", "postgres://me:s3cr3t-0123456789@host/db", "s3cr3t-0123456789"),
        ("PROXY_URL", "http://s3cr3t-0123456789@proxy:8080", "s3cr3t-0123456789"),
        ("QUEUE", "amqp://me:a%2Fb%40c-0123456789@host", "a/b@c-0123456789"),
        (
            "SSH_KEY",
            "-----BEGIN-----\nabcdefghijklmnop\n-----END-----",
            "-----BEGIN-----\nabcdefghijklmnop\n-----END-----",
        ),
    ],
)
def test_no_secret_reaches_a_log_in_whatever_pieces_it_comes(name: str, value: str, secret: str) -> None:
    text = f"before {secret} after\n".encode()
    for size in (1, 5, len(text)):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert logged(chunks, **{name: value}) == b"before *** after\n"


def test_what_is_no_secret_is_not_masked() -> None:
    text = b"TOKENIZERS_PARALLELISM=falsefalse https://host/path\n\xff\xfe"
    variables = {"TOKENIZERS_PARALLELISM": "falsefalse", "HOMEPAGE": "https://host/path", "MONKEY": "host/path"}
    variables |= {"PWD": "host/path", "COMPASS": "host/path"}
    assert logged([text], **variables) == text


@pytest.mark.parametrize(
    ("file", "recipe"),
    [
        ("r.yaml", "name: r\nstages:\n  SECRET: {kind: report}\n"),
        ("r.yaml", "name: r\nmatrix: {a: {SECRET: 1}}\nstages:\n  report: {kind: report}\n"),
        ("r.yaml", "name: r\nmatrix: {SECRET: [1, 2]}\nstages:\n  report: {kind: report}\n"),
        ("r.yaml", "name: r\nmatrix: {a: [SECRET, b]}\nstages:\n  report: {kind: report, title: '${matrix.a}'}\n"),
        ("SECRET.yaml", "name: r\nstages:\n  report: {kind: report}\n"),
    ],
)
def test_a_secret_in_a_name_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str, recipe: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "stageSecret123")
    place = folder / file.replace("SECRET", "stageSecret123")
    place.write_text(recipe.replace("SECRET", "stageSecret123"))
    assert main([str(place), "--plan"]) == 2
    out, err = capsys.readouterr()
    assert "contains the secret of the environment variable HF_TOKEN; remove it" in err
    assert "stageSecret123" not in out + err


# ---------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("name", ["stage.json", "report.md"])
def test_what_may_not_be_read_is_named_and_neither_damaged_nor_replaced(folder: Path, name: str) -> None:
    """Another user's result of mode 0600, as libraries leave files that they write through temporary ones."""
    subprocess.run(CALL, cwd=folder, capture_output=True, env=environment(), check=True)
    file = (folder / "runs/r/report").resolve() / name
    before = file.stat().st_ino
    call = CALL
    if os.geteuid() == 0:  # root without the right to read everything
        os.chown(file, 12345, 12345)
        file.chmod(0o600)
        rights = "-dac_override,-dac_read_search"
        call = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *CALL]
    else:
        file.chmod(0)
    for option in ([], ["--plan"]):
        done = subprocess.run(
            [*call, *option], cwd=folder, capture_output=True, text=True, env=environment(), check=False
        )
        assert done.returncode == 1
        place = file.relative_to(folder.resolve())
        assert f"no permission to read {place}, which belongs to " in done.stderr
        assert "ask for `chmod -R g+rX`, or name another folder by --runs" in done.stderr
        assert "damaged" not in done.stderr + done.stdout
    assert file.stat().st_ino == before


def test_a_second_user_of_the_group_reads_and_reuses_results(folder: Path) -> None:
    """The first user's umask is 002. The second one owns no file, and has no rights but the group's."""
    call = [sys.executable, "-P", "-m", "pipeline.cli"]
    folder.chmod(0o2775)
    subprocess.run([*call, "r.yaml"], cwd=folder, capture_output=True, env=environment(), check=True, umask=0o002)
    (folder / "r2.yaml").write_text("name: r2\nstages:\n  report: {kind: report, runs: [other], title: Mine}\n")
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 12345, 23456, follow_symlinks=False)
        folder.chmod(0o2775)  # which chown removes
        rights = "-dac_override,-dac_read_search,-fowner,-chown"
        call = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", "--groups=23456", *call]
    for recipe, state in (("r.yaml", "cached"), ("r2.yaml", "done"), ("r.yaml", "cached")):
        done = subprocess.run(
            [*call, recipe], cwd=folder, capture_output=True, text=True, env=environment(), check=False, umask=0o002
        )
        assert done.returncode == 0, done.stderr
        assert f'"state": "{state}"' in (folder / "runs" / recipe[:-5] / "run.json").read_text()


# ------------------------------------------------------------------------------------------------- internal errors


@pytest.mark.parametrize("as_json", [False, True])
def test_an_internal_error_ends_in_one_line_that_names_a_file_with_the_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """One that no check foresees, so it has to be planted."""

    def fail(*_: object) -> None:
        raise RuntimeError("no such case: s3cr3t-0123456789\nmore")

    monkeypatch.setenv("HF_TOKEN", "s3cr3t-0123456789")
    monkeypatch.setattr("pipeline.cli.build_plan", fail)
    assert main(["r.yaml", "--plan", *(["--json"] if as_json else [])]) == 3
    out, err = capsys.readouterr()
    text = json.loads(out)["error"][0]["message"] if as_json else err
    assert text.count("\n") == (0 if as_json else 1)
    start = "" if as_json else "run-recipe: "
    assert text.startswith(f"{start}internal error: RuntimeError: no such case: ***; this is a mistake of run-recipe")
    trace = Path(text.strip().rpartition(" ")[2]).read_text()
    assert trace.startswith("Traceback (most recent call last):")
    assert "in fail" in trace
    assert "s3cr3t" not in trace
