"""Runs a `push` stage: a published model, its card completed with scores -> one commit on the hub."""

from __future__ import annotations

from pathlib import Path

from stages.base import Context
from stages.data.reader import DROPPED_ROWS
from stages.push.config import PushStage
from stages.push.hub import upload
from stages.records.manifest import MANIFEST
from stages.records.metrics import Metrics
from stages.training.model_card import CARD, card

KEPT_HERE = (MANIFEST, DROPPED_ROWS, CARD)
"""What is not uploaded: it tells of this machine and of the data; the card is written anew."""


def run(context: Context) -> Metrics:
    """Upload context.inputs["model"]; leaves the card as it was uploaded.

    The result: {"repo", "url", "commit", "files", "notes"}.
    """
    stage: PushStage = context.config
    model = context.inputs["model"]
    scores = [row for name, given in context.inputs.items() if name != "model" for row in given.metrics.results or []]
    text = card(model, stage.repo, scores, stage.license)
    (context.out / CARD).write_text(text, encoding="utf-8")
    files: dict[str, Path | bytes] = {
        str(path.relative_to(model.path)): path for path in sorted(model.path.rglob("*")) if path.is_file()
    }
    files = {name: path for name, path in files.items() if name not in KEPT_HERE} | {CARD: text.encode()}
    context.progress(0, 1, f"uploading to {stage.repo}")
    commit = upload(stage.repo, stage.private, files, "Upload the model and its card")
    return Metrics(
        repo=stage.repo,
        url=commit.commit_url,
        commit=commit.oid,
        files=len(files),
        notes=[f"uploaded: {commit.commit_url}"],
    )
