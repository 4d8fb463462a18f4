"""Mutated files of every kind that the command reads, by the hundred: a plan or an error in words, never a traceback.

Recipes have their own test (tests/pipeline/recipe/test_recipe_fuzz.py). Seeds are fixed, so that a failure comes back.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.cli import main
from stages.base import UserError
from stages.data.reader import read_examples
from stages.models.generation_config import read_generation_config, unpublishable
from stages.models.model_folder import check_context
from stages.sft.config import SFTStage
from stages.system.integrity import content_hash
from tests.pipeline.run.test_command import TASK

pytestmark = pytest.mark.long

COUNT = 500
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    10**400,
    "",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    {"": None},
    "../../x",
    "\x1b[2J",
]
ODD += [{"a": {"b": [1, {"c": None}]}}, [None] * 50, "=1+1", "org/name", 2**63, -(2**63), 0.1]
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann.", "weight": 0.5}],
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ben.", "tool_calls": [CALL]}],
]
ROWS = [{"messages": chat} for chat in CHATS]
OPTIONAL: dict[str, Any] = {
    "config.json": {
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": ["own.Own"]},
        "attn_implementation": {"": "sdpa", "text_config": "eager"},
        "text_config": {"max_position_embeddings": 64, "_attn_implementation": "sdpa"},
        "quantization_config": {"quant_method": "bitsandbytes"},
    },
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}},
    "generation_config.json": {
        "temperature": 0.5,
        "top_p": 0.9,
        "num_beams": 2,
        "stop_strings": ["a"],
        "max_time": 9.0,
    },
}
"""What the file of a model may contain besides."""
RECIPE = """\
name: r
model: ./model
stages:
  it:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_steps: 1}
  bench: {kind: lm_eval, models: [it], include_path: ./tasks, tasks: [{task: colours}]}
  report: {kind: report}
"""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated_json(value: Any, draw: random.Random) -> Any:
    """A copy in which one to three values are odd, missing or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        container, key = draw.choice(found)
        action = draw.random()
        if action < 0.6:
            container[key] = copy.deepcopy(draw.choice(ODD))
        elif action < 0.8:
            del container[key]
        else:
            other, other_key = draw.choice(found)
            container[key] = copy.deepcopy(other[other_key])
    return value if draw.random() < 0.97 else copy.deepcopy(draw.choice(ODD))


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A copy with flipped, missing, doubled or foreign bytes, or a part of it."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        action = draw.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            del changed[at : at + draw.randint(1, 20)]
        elif action == 2:
            changed[at:at] = changed[at : at + draw.randint(1, 20)]
        elif action == 3:
            changed[at:at] = draw.choice(
                [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 2000, b"9" * 500, b"\r", b'"', b"!x "]
            )
        else:
            del changed[at:]
    return bytes(changed)


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(TASK)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plans(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    """Demand that the command plans or reports an error."""
    assert main(["r.yaml", *(arguments or ["--plan"])]) in (0, 1, 2)
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    assert "internal error" not in output.err


def test_task_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, file = random.Random(1), folder / "tasks/colours.yaml"
    for _ in range(COUNT):
        file.write_bytes(mutated_bytes(TASK.encode(), draw))
        plans(capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_json_of_a_model(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    draw, file = random.Random(name), folder / "model" / name
    original = json.loads(file.read_text()) | OPTIONAL.get(name, {})
    stage = SFTStage(data={"train": "./rows.jsonl"}, weights={"prompt": 0, "completion": 1})  # type: ignore[arg-type]
    for _ in range(COUNT // 4):
        file.write_text(json.dumps(mutated_json(original, draw)))
        plans(capsys)
        refuses(lambda: stage.check({"model": folder / "model", "train": folder / "rows.jsonl"}))
        refuses(lambda: check_context(folder / "model", 8, "options.max_length"))
        if name == "generation_config.json":
            refuses(lambda: unpublishable(read_generation_config(folder / "model")))


def test_index_of_the_weights(folder: Path) -> None:
    draw, file = random.Random(3), folder / "model/model.safetensors.index.json"
    original = {
        "metadata": {"total_size": 5},
        "weight_map": {"a.weight": "model.safetensors", "b": "model.safetensors"},
    }
    stage = SFTStage(data={"train": "./rows.jsonl"}, weights={"prompt": 0, "completion": 1})  # type: ignore[arg-type]
    for _ in range(COUNT):
        file.write_text(json.dumps(mutated_json(original, draw)))
        refuses(lambda: stage.check({"model": folder / "model", "train": folder / "rows.jsonl"}))
        refuses(lambda: check_context(folder / "model", 8, "options.max_length"))


def refuses(check: Callable[[], Any]) -> None:
    """Demand that a check passes or raises a UserError."""
    with contextlib.suppress(UserError):
        check()


def read(path: Path) -> None:
    stage = SFTStage(data={"train": str(path)}, weights={"prompt": 0, "completion": 1})  # type: ignore[arg-type]
    for _ in read_examples(path, stage.data.reading("train", stage.data.format)):
        pass


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    draw, file = random.Random(suffix), tmp_path / f"rows.{suffix}"
    for number in range(COUNT):
        rows = [mutated_json(row, draw) for row in ROWS]
        if suffix == "csv":
            data = b"prompt,completion,loss_weights\n" + b"".join(
                json.dumps(row).encode() + b',"b","[1, 2]"\n' for row in rows
            )
        elif suffix == "json":
            data = json.dumps(rows).encode()
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(mutated_bytes(data, draw) if number % 2 else data)
        refuses(lambda: read(file))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bytes_of_arrow(tmp_path: Path, suffix: str) -> None:
    draw, file = random.Random(suffix), tmp_path / f"rows.{suffix}"
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": [1, 2]})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write(table)
    original = file.read_bytes()
    for _ in range(COUNT):
        file.write_bytes(mutated_bytes(original, draw))
        refuses(lambda: read(file))


MANIFEST: dict[str, Any] = {
    "schema": 2, "step": "it", "kind": "sft", "version": 4, "fingerprint": "f" * 32, "config": {}, "labels": {},
    "inputs": {"model": {"reference": "./model", "sha256": "a"}}, "outputs": {"config.json": "b"},
    "metrics": {"results": None, "notes": []}, "environment": {}, "started": "2026", "seconds": 1.0, "sha256": "",
}  # fmt: skip
STEP: dict[str, Any] = {
    "step": "it", "kind": "sft", "labels": {}, "state": "done", "fingerprint": "f" * 32, "path": "store/sft/f",
    "seconds": 1.0, "error": None, "progress": [1, 2, "x"],
}  # fmt: skip
RECORD: dict[str, Any] = {
    "recipe": "other", "status": "done", "host": "h", "pid": 1, "written": "2026-01-01T00:00:00+00:00",
    "side_by_side": 1, "steps": [STEP], "recipe_file": "r.yaml",
}  # fmt: skip


def test_manifests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(6)
    assert main(["r.yaml", "--plan", "--json"]) == 0
    fingerprint = json.loads(capsys.readouterr().out)["steps"][0]["fingerprint"]
    place = folder / "runs/store/sft" / fingerprint / "stage.json"
    place.parent.mkdir(parents=True)
    for number in range(COUNT):
        body = mutated_json(MANIFEST | {"fingerprint": fingerprint}, draw)
        if isinstance(body, dict) and number % 2:  # as somebody would write it who knows the checksum
            body["sha256"] = content_hash({key: value for key, value in body.items() if key != "sha256"})
        place.write_text(json.dumps(body))
        plans(capsys)
        assert main(["--verify", "runs"]) in (0, 1)
        assert "Traceback" not in "".join(capsys.readouterr())


def test_records_of_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, file = random.Random(7), folder / "runs/other/run.json"
    file.parent.mkdir(parents=True)
    (folder / "r.yaml").write_text("name: other\nstages:\n  report: {kind: report, runs: [other]}\n")
    for number in range(COUNT):
        data = json.dumps(mutated_json(RECORD, draw)).encode()
        file.write_bytes(mutated_bytes(data, draw) if number % 4 == 0 else data)
        plans(capsys)
        plans(capsys, "--status")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
