"""stage.json: the manifest of a published result. It is written last, and its own hash protects it."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from stages.records.metrics import Metrics, Record
from stages.system.integrity import content_hash, read_json, write_json

MANIFEST = "stage.json"
MANIFEST_SCHEMA = 2  # version of the file's form; raise it if an older reader would misread the new form


class ManifestError(Exception):
    """A manifest that nobody should trust. The message is the reason."""


class InputRecord(Record):
    """One input of a result: a step of the recipe, or a reference."""

    step: str | None = None
    fingerprint: str | None = None
    """Fingerprint of that step."""
    digest: str | None = None
    """Hash of the files that the step published."""
    reference: str | None = None
    """What the recipe calls the file, folder or model, without a path of this machine."""
    content: str | None = None
    """Content hash of the reference."""


class Manifest(Record):
    """What the store knows about one published result."""

    model_config = ConfigDict(extra="ignore")

    step: str
    kind: str
    recipe: str | None = None
    """Name of the recipe whose run computed it; None in results of older versions."""
    version: int
    """`version` of the kind of stage."""
    fingerprint: str
    config: dict[str, Any]
    """The stage's section of the recipe, with all references resolved."""
    inputs: dict[str, InputRecord]
    metrics: Metrics
    environment: dict[str, Any]
    """Versions of packages, the machine, and the command."""
    started: str
    """Time of day, ISO 8601, UTC."""
    seconds: float
    """Duration of the step's process."""
    outputs: dict[str, str]
    """Name of each published file -> sha256."""
    sha256: str = ""
    """Hash of all other keys; empty until the manifest is written."""

    @property
    def digest(self) -> str:
        """Hash of all published files: two results of one fingerprint are equal if their digests are."""
        return content_hash(self.outputs)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write stage.json into `folder`. Raises OSError."""
    body = {"schema": MANIFEST_SCHEMA, **manifest.model_dump(mode="json", exclude_unset=True, exclude={"sha256"})}
    write_json(folder / MANIFEST, body | {"sha256": content_hash(body)})


def read_manifest(folder: Path, fingerprint: str | None = None) -> Manifest:
    """Read stage.json in `folder`, which is named by its fingerprint unless `fingerprint` is set.

    Raises:
        ManifestError: the file is missing, not valid, changed, or belongs to another fingerprint.
        PermissionError: this user may not read it, which says nothing about the result.
    """
    try:
        body = read_json(folder / MANIFEST)
        if body["schema"] != MANIFEST_SCHEMA:
            raise ManifestError(f"{MANIFEST} has form {body['schema']}, but this version reads form {MANIFEST_SCHEMA}")
        manifest = Manifest.model_validate(body)
        del body["sha256"]
    except FileNotFoundError:
        raise ManifestError(f"{MANIFEST} is missing") from None
    except PermissionError:
        raise
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ManifestError(f"{MANIFEST} cannot be read (bad or missing key {key})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if content_hash(body) != manifest.sha256:
        raise ManifestError(f"{MANIFEST} was changed after it was written")
    if manifest.fingerprint != (fingerprint or folder.name):
        raise ManifestError(f"{MANIFEST} belongs to fingerprint {manifest.fingerprint}")
    return manifest
