"""The hub, through huggingface_hub: whether we may write to a repository, and the upload itself.

The hub is the one that HF_ENDPOINT names, huggingface.co where it is not set. The token is HF_TOKEN, or the one that
`hf auth login` left; it is never written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from stages.base import UserError

CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Files that are removed from the repository where the model has none of the name: loaders would take them for it."""


def require_access(repo: str) -> None:
    """Raise UserError where the token is missing or refused, or may not write to the owner of `repo`."""
    if get_token() is None:
        raise UserError(
            "uploading needs a token that may write: set the environment variable HF_TOKEN, or run 'hf auth login'",
            "repo",
        )
    api = HfApi()
    with _told(api, repo):
        known = api.whoami()
    owner = repo.partition("/")[0]
    mine = [known["name"], *(each["name"] for each in known.get("orgs", []))]
    if owner not in mine:
        raise UserError(f"{owner!r} is not among the owners that this token writes for: {', '.join(mine)}", "repo")
    if ((known.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError("the token may only read; make one that may write on the hub's page settings/tokens", "repo")


def upload(repo: str, private: bool, files: dict[str, Path | bytes], message: str) -> CommitInfo:
    """Put `files`, by their names in the repository, there in one commit: nobody ever finds half of a model.

    Raises UserError where the hub refuses or cannot be reached, or where the repository is public and should not be.
    """
    api = HfApi()
    with _told(api, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise UserError(f"{repo} is public; set private: false, or make it private on the hub", "private")
        there = [file.rfilename for file in info.siblings or []]
        stale = [name for name in there if name not in files and name.endswith(WEIGHTS)]
        operations: list[CommitOperation] = [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, content) for name, content in files.items()),
        ]
        return api.create_commit(repo, operations, commit_message=message)


@contextmanager
def _told(api: HfApi, repo: str) -> Iterator[None]:
    """What goes wrong with the hub, as what a user can mend."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("uploading needs the hub, but HF_HUB_OFFLINE is set; unset it", "repo") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; set HF_TOKEN to another, or run 'hf auth login'",
            403: "the token may not write there; make one that may on the hub's page settings/tokens",
            404: "there is no such repository for this token",
        }.get(status, "run it again to try once more")
        said = (error.server_message or "").strip().splitlines()
        raise UserError(f"{api.endpoint} answers {status} for {repo}{_first(said)}; {remedy}", "repo") from None
    except UserError:
        raise
    except Exception as error:  # which library carries its requests depends on the client's version
        cause = error.__cause__ or error  # of an upload in a thread
        raise UserError(
            f"{api.endpoint} (HF_ENDPOINT) cannot be used for {repo}{_first(str(cause).strip().splitlines())};"
            " run it again when it can",
            "repo",
        ) from None


def _first(lines: list[str]) -> str:
    return f": {lines[0]}" if lines else ""
