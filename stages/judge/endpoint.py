"""The judge's OpenAI-compatible endpoint: its address, and a check that it has the judge.

The environment variable OPENAI_BASE_URL names the endpoint, OpenAI's own if it is not set, and OPENAI_API_KEY the key.
The key is never written to a file; of the address only host and path, with the judgements.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from functools import cache
from urllib.parse import urlsplit, urlunsplit

from stages.base import UserError
from stages.system.did_you_mean import similar_names

OPENAI = "https://api.openai.com/v1"
LIST_TIMEOUT = 20.0
"""Seconds to wait for the endpoint's list of models."""


def base_url() -> str:
    return os.environ.get("OPENAI_BASE_URL", OPENAI).rstrip("/")


def endpoint() -> str:
    """Return the endpoint's address without a password and a query, to identify it in results."""
    parts = urlsplit(base_url())
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@cache
def require_model(name: str) -> None:
    """Raise UserError if the endpoint is down, rejects the key or does not have the model. Asks it once."""
    url = base_url()
    if not url.startswith(("http://", "https://")):
        raise UserError(f"OPENAI_BASE_URL is {url!r}, which is not an http or https address", "judge")
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError("OPENAI_API_KEY is not set; for an endpoint without keys, set it to any value", "judge")
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=LIST_TIMEOUT) as response:
            listing = json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(f"{url} refuses the key in OPENAI_API_KEY ({error.code})", "judge") from None
        if error.code in (404, 405):
            return  # it does not list models
        raise UserError(f"{url} answers {error.code} {error.reason}", "judge") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url} (OPENAI_BASE_URL) cannot be reached: {error}", "judge") from None
    data = listing.get("data") if isinstance(listing, dict) else None
    names = [str(model["id"]) for model in data or [] if isinstance(model, dict) and "id" in model]
    if names and name not in names:
        raise UserError(f"{url} has no model {name!r}; it has {similar_names(name, names)}", "judge")
