"""Run a `push` stage: complete the card of a published model with scores, and upload both in one commit."""

from pathlib import Path

from stages.base import Context
from stages.data.reader import DROPPED_ROWS
from stages.push.config import PushStage
from stages.push.hub import upload
from stages.records.manifest import MANIFEST
from stages.records.metrics import Metrics
from stages.training.model_card import CARD, card

LOCAL_FILES = (MANIFEST, DROPPED_ROWS, CARD)
"""Not uploaded: they describe this machine and the data. The upload has a card of its own."""


def run(context: Context) -> Metrics:
    """Upload context.inputs["model"], and write the uploaded card to the output folder."""
    stage: PushStage = context.config
    model = context.inputs["model"]
    scores = [row for name, source in context.inputs.items() if name != "model" for row in source.metrics.results or []]
    text = card(model, stage.repo, scores, stage.license)
    (context.out / CARD).write_text(text, encoding="utf-8")
    paths = {str(path.relative_to(model.path)): path for path in sorted(model.path.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {name: path for name, path in paths.items() if name not in LOCAL_FILES}
    files[CARD] = text.encode()
    context.progress(0, 1, f"uploading to {stage.repo}")
    commit = upload(stage.repo, stage.private, files, "Upload the model and its card")
    return Metrics(
        repo=stage.repo,
        url=commit.commit_url,
        commit=commit.oid,
        files=len(files),
        notes=[f"uploaded: {commit.commit_url}"],
    )
