"""Access checks and uploads, through huggingface_hub.

HF_ENDPOINT names the hub, huggingface.co by default. The token is HF_TOKEN, or the one that `hf auth login` saved.
It is never written to disk here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from stages.base import UserError
from stages.system.terminal_text import first_line

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Old files with these endings are deleted from the repository: loaders would mix them with the model's."""


@cache
def require_access(repo: str) -> None:
    """Raise UserError if there is no valid token that may write to the owner of `repo`. Asks the hub once."""
    if get_token() is None:
        raise UserError(
            "uploading needs a token that may write: set the environment variable HF_TOKEN, or run 'hf auth login'",
            "repo",
        )
    api = HfApi()
    with _explained_errors(api, repo):
        account = api.whoami()
    owner = repo.partition("/")[0]
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if owner not in owners:
        raise UserError(f"{owner!r} is not among the owners that this token writes for: {', '.join(owners)}", "repo")
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError("the token may only read; create one that may write at settings/tokens on the hub", "repo")


def upload(repo: str, private: bool, files: dict[str, Path | bytes], message: str) -> CommitInfo:
    """Upload `files`, keyed by their names in the repository, in one commit, so that no reader sees half a model."""
    api = HfApi()
    with _explained_errors(api, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise UserError(f"{repo} is public; set private: false, or make it private on the hub", "private")
        names = [file.rfilename for file in info.siblings or []]
        stale = [name for name in names if name not in files and name.endswith(WEIGHTS)]
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo, operations, commit_message=message)


@contextmanager
def _explained_errors(api: HfApi, repo: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("uploading needs the hub, but HF_HUB_OFFLINE is set; unset it", "repo") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; set HF_TOKEN to another, or run 'hf auth login'",
            403: "the token may not write there; create one that may at settings/tokens on the hub",
            404: "this token sees no such repository",
        }.get(status, "run it again")
        reason = first_line(error.server_message or error)
        raise UserError(f"{api.endpoint} answers {status} for {repo}: {reason}; {remedy}", "repo") from None
    except UserError:
        raise
    except Exception as error:  # the type depends on the client's HTTP library
        reason = first_line(error.__cause__ or error)  # a thread's upload wraps its cause
        raise UserError(
            f"{api.endpoint} (HF_ENDPOINT) cannot be used for {repo}: {reason}; run it again when it can", "repo"
        ) from None
