"""Runs a `push` stage: a published model, its card completed with scores -> one commit on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.base import BadInput, Context, Input
from stages.card import CARD, card
from stages.push.config import PushStage
from stages.push.hub import upload
from stages.ran import MANIFEST
from stages.reading import DROPPED_ROWS

KEPT_HERE = (MANIFEST, DROPPED_ROWS, CARD)
"""What is not uploaded: it tells of this machine and of the data; the card is written anew."""


def run(context: Context) -> dict[str, Any]:
    """Upload context.inputs["model"]; leaves the card as it was uploaded.

    The result: {"repo", "url", "commit", "files", "notes"}.
    """
    stage: PushStage = context.config
    model = context.inputs["model"]
    text = card(model, stage.repo, _scores(stage, model, context.inputs), stage.license)
    (context.out / CARD).write_text(text, encoding="utf-8")
    files: dict[str, Path | bytes] = {
        str(path.relative_to(model.path)): path for path in sorted(model.path.rglob("*")) if path.is_file()
    }
    files = {name: path for name, path in files.items() if name not in KEPT_HERE} | {CARD: text.encode()}
    context.progress(0, 1, f"uploading to {stage.repo}")
    commit = upload(stage.repo, stage.private, files, "Upload the model and its card")
    return {
        "repo": stage.repo,
        "url": commit.commit_url,
        "commit": commit.oid,
        "files": len(files),
        "notes": [f"uploaded: {commit.commit_url}"],
    }


def _scores(stage: PushStage, model: Input, inputs: dict[str, Input]) -> list[dict[str, Any]]:
    """The rows of the results that are of this model. Raises BadInput where some are asked for and there are none."""
    found = [
        given
        for name, given in inputs.items()
        if name != "model" and given.inputs["model"].fingerprint == model.fingerprint
    ]
    if stage.results and not found:
        raise BadInput(f"results: {', '.join(stage.results)} did not score {stage.model}; name it among their models")
    return [row for given in found for row in given.metrics["results"]]
