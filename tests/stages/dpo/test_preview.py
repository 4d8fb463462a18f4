"""The preview of pairs, by hand with the byte tokenizer; the tokens of previews and of training, in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference

from stages.base import Context, Input
from stages.data.dataset_cache import load_rows
from stages.data.tokenization import Preparer
from stages.dpo.config import DPOStage
from stages.dpo.pairs import load_pairs
from stages.dpo.preview import preview
from stages.kinds import KINDS
from stages.sft.preview import preview as sft_preview
from tests.stages.dpo.test_pairs import CHATS, TEXTS, TOOL_TEMPLATE, TOOLS, merging_tokenizer
from tests.tiny import byte_tokenizer


def save(folder: Path, template: str | None = None) -> Path:
    """Save the byte tokenizer, as the model that a stage starts from."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def shown(folder: Path, rows: list[dict[str, Any]], model: Path | None = None, **train: Any) -> tuple[Any, str, Any]:
    """The preview of all rows."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = DPOStage.model_validate({"data": {"train": "./pairs.jsonl"}, "train": train})
    return preview("dpo", stage, {"train": path, "model": model or save(folder / "model")}, len(rows))


def test_a_pair(tmp_path: Path) -> None:
    values, page, _ = shown(tmp_path, TEXTS[:1])
    (example,) = values["examples"]
    runs = [(token["text"], token["segment"], token["weight"], token["label"]) for token in example["tokens"]]
    assert runs == [
        *((text, "prompt", 0, "prompt ×0") for text in "Sky? "),  # noqa: RUF001
        *((text, "chosen", 1, "chosen ×1") for text in [*"blue", "<end>"]),  # noqa: RUF001
        *((text, "rejected", -1, "rejected ×-1") for text in [*"a green one", "<end>"]),  # noqa: RUF001
    ]
    assert (example["weighing"], example["cut"], example["notes"]) == ({"chosen": 5, "rejected": 12}, 0, [])
    assert values["weights"] == {"prompt": 0, "chosen": 1, "rejected": -1}
    assert page.count('title="') == 5 + 5 + 12
    assert [page.count(f'boundary">{name}<') for name in ("chosen", "rejected")] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "train", "counts", "notes"),
    [
        (  # 5 + 5 and 5 + 12 tokens
            TEXTS[:1],
            {"max_length": 12},
            {"chosen": 5, "rejected": 7},
            ["5 tokens truncated at max_length 12; raise train.max_length to keep them"],
        ),
        (
            TEXTS[:1],
            {"max_length": 5},
            {},
            [
                "the prompt fills max_length, so training leaves this pair out",
                "17 tokens truncated at max_length 5; raise train.max_length to keep them",
            ],
        ),
        (
            [{"prompt": "p", "chosen": "ab", "rejected": "ac"}],
            {"max_length": 2},
            {},
            [
                "chosen and rejected are equal within max_length, so training leaves this pair out",
                "4 tokens truncated at max_length 2; raise train.max_length to keep them",
            ],
        ),
    ],
    ids=["truncated", "too long", "equal"],
)
def test_notes(tmp_path: Path, rows: Any, train: dict[str, Any], counts: dict[str, int], notes: list[str]) -> None:
    (example,) = shown(tmp_path, rows, **train)[0]["examples"]
    assert (example["weighing"], example["notes"]) == (counts, notes)


def test_keep_end(tmp_path: Path) -> None:
    """Of Sky? + a green one, 12 tokens are the completion alone, whose first token nothing predicts."""
    (example,) = shown(tmp_path, TEXTS[:1], max_length=12, truncation_mode="keep_end")[0]["examples"]
    labels = [token["label"] for token in example["tokens"]]
    assert labels == [
        *["prompt ×0, before chosen only"] * 5,  # noqa: RUF001
        *["chosen ×1"] * 5,  # noqa: RUF001
        "not predicted",
        *["rejected ×-1"] * 11,  # noqa: RUF001
    ]


def test_prompts_that_differ(tmp_path: Path) -> None:
    merging_tokenizer().save_pretrained(tmp_path / "model")
    row = {"prompt": "xa", "chosen": "b", "rejected": "c"}
    (example,) = shown(tmp_path, [row], tmp_path / "model")[0]["examples"]
    assert [token["text"] for token in example["tokens"]] == ["x", "ab", "<end>", "a", "c", "<end>"]
    assert example["merged"] == 1
    assert example["notes"] == [
        "the tokens before chosen and before rejected differ; the prompt is what both start with"
    ]


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a file, or as a data set folder; lists are JSON in CSV."""
    path = folder / f"rows.{form}"
    if form == "folder":
        path = folder / "rows"
        path.mkdir()
        write(path, "jsonl", rows).rename(path / "train.jsonl")
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


FILES = [(form, rows) for rows in ("text", "tools") for form in ("jsonl", "json", "csv", "parquet", "folder")]
ROWS = {"text": TEXTS, "tools": [*TOOLS, *CHATS]}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize(("form", "rows"), [file for file in FILES if file != ("csv", "tools")])
def test_tokens_are_those_of_training(tmp_path: Path, kind: str, form: str, rows: str) -> None:
    """Parquet needs one type for each argument, so one tool's is left out there."""
    pairs = [row for row in ROWS[rows] if form != "parquet" or row is not TOOLS[1]]
    if kind == "sft":
        pairs = [
            {("completion" if name == "chosen" else name): row[name] for name in row if name != "rejected"}
            for row in pairs
        ]
    path = write(tmp_path, form, pairs)
    model = save(tmp_path / "model", TOOL_TEMPLATE if rows == "tools" else None)
    section: dict[str, Any] = {"data": {"train": "./rows"}, "train": {"max_length": 60}}
    stage = KINDS[kind].model_validate(section | ({"weights": {"prompt": 1, "completion": 1}} if kind == "sft" else {}))
    folders = [tmp_path / name for name in ("out", "scratch", "checkpoints", "cache")]
    context = Context("r", kind, stage, {"train": Input(path, fingerprint="1")}, *folders, progress=lambda *_: None)
    show = sft_preview if kind == "sft" else preview
    examples = show(kind, stage, {"train": path, "model": model}, len(pairs))[0]["examples"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE if rows == "tools" else tokenizer.chat_template
    if kind == "sft":
        prepared, _ = load_rows(context, "train", Preparer(tokenizer, 60))
        assert [[token["id"] for token in example["tokens"]] for example in examples] == prepared["input_ids"][:]
        return
    dataset = load_pairs(context, "train", tokenizer).dataset
    batch = DataCollatorForPreference(tokenizer.pad_token_id, max_length=60)(list(dataset))
    trained = [ids[seen == 1].tolist() for ids, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    previewed = [example for example in examples if example["weighing"]]
    assert trained == [
        [token["id"] for token in example["tokens"] if token["segment"] != other]
        for other in ("rejected", "chosen")
        for example in previewed
    ]
