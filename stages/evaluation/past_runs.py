"""Results of other recipes' last runs, for reports that join several runs."""

from pathlib import Path

from stages.base import Input, UserError
from stages.records.manifest import Manifest, ManifestError, read_manifest
from stages.records.run_record import RUN_RECORD, RunRecord, StepRecord, read_run_record
from stages.system.integrity import content_hash, damage


def read_past_run(folder: Path) -> tuple[dict[str, Input], RunRecord | None]:
    """Read the last run of a recipe, in `folder`, which may not exist yet.

    Returns:
        Each step that scored a model -> its result, with the lineage of the model; and the record of the run.

    Raises:
        UserError: if run.json, a manifest or a file of scores is unreadable or was changed.
    """
    record = _record(folder)
    steps = record.steps if record else []
    finished = {step.fingerprint: step for step in steps if step.path}
    manifests = {fingerprint: _manifest(folder, step) for fingerprint, step in finished.items()}

    def result(step: StepRecord, before: tuple[StepRecord, ...] = ()) -> Input:
        if step in before:
            raise UserError(f"{folder}: {step.step} was computed from itself; run its recipe again")
        manifest, path = manifests[step.fingerprint], folder.parent / (step.path or "")
        if not before and manifest.metrics.results is not None and (text := damage(path, manifest.outputs)):
            raise UserError(f"{path}: {step.step} of {folder.name}: {text}; run its recipe again")
        inputs = {}
        for name, record in manifest.inputs.items():
            source = finished.get(record.fingerprint) if record.fingerprint else None
            inputs[name] = (
                result(source, (*before, step)) if source else Input(Path(), fingerprint=record.content or "")
            )
        return Input(
            path=path,
            step=step.step,
            kind=step.kind,
            fingerprint=step.fingerprint or "",
            config=manifest.config,
            metrics=manifest.metrics,
            inputs=inputs,
            labels=dict(step.labels),
        )

    results = {step.step: result(step) for step in steps if step.path}
    return {name: output for name, output in results.items() if output.metrics.results is not None}, record


def past_run_hash(folder: Path) -> str:
    """Hash of everything that `read_past_run` returns. Raises UserError."""
    record = _record(folder)
    steps = record.steps if record else []
    hashes = [_manifest(folder, step).sha256 if step.path else None for step in steps]
    entries = [[step.step, step.labels, sha256] for step, sha256 in zip(steps, hashes, strict=True)]
    return content_hash([folder.name, record and record.recipe_file, entries])


def _record(folder: Path) -> RunRecord | None:
    try:
        return read_run_record(folder) if folder.is_dir() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN_RECORD}: is not the record of a run ({error}); run its recipe again") from None


def _manifest(folder: Path, step: StepRecord) -> Manifest:
    result = folder.parent / (step.path or "")
    try:
        return read_manifest(result)
    except ManifestError as error:
        raise UserError(f"{result}: {step.step} of {folder.name}: {error}; run its recipe again") from None
