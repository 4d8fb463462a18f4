"""The judge's OpenAI-compatible endpoint: its address, and a check that it has the judge.

The environment variable OPENAI_BASE_URL names the endpoint, OpenAI's own if it is not set, and OPENAI_API_KEY the key.
The key is never written to a file; of the address only scheme and host.
"""

import asyncio
import json
import os
from functools import cache
from urllib.parse import urlsplit

from stages.base import UserError
from stages.system.did_you_mean import similar_names

OPENAI = "https://api.openai.com/v1"
LIST_TIMEOUT = 20.0
"""Seconds to wait for the endpoint's list of models."""


def base_url() -> str:
    return os.environ.get("OPENAI_BASE_URL", OPENAI).rstrip("/")


def endpoint() -> str:
    """Return the endpoint's scheme and host, which identify it in results and messages: paths may hold keys."""
    parts = urlsplit(base_url())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


@cache
def require_model(name: str) -> None:
    """Raise UserError if the endpoint is down, rejects the key or does not have the model. Asks it once."""
    if not base_url().startswith(("http://", "https://")):
        raise UserError("OPENAI_BASE_URL is not an http or https address", "judge")
    url = endpoint()
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError("OPENAI_API_KEY is not set; for an endpoint without keys, set it to any value", "judge")
    try:
        status, body = asyncio.run(_list_models(key))
        listing = json.loads(body) if status < 400 else None
    except (UserError, KeyboardInterrupt):
        raise
    except RecursionError:
        raise UserError(f"{url} (OPENAI_BASE_URL) answers with JSON that is too deep", "judge") from None
    except Exception as error:  # of any type of the HTTP library
        raise UserError(f"{url} (OPENAI_BASE_URL) cannot be reached: {error}", "judge") from None
    if status in (401, 403):
        raise UserError(f"{url} refuses the key in OPENAI_API_KEY ({status})", "judge")
    if status in (404, 405):
        return  # it does not list models
    if status >= 400:
        raise UserError(f"{url} answers {status}", "judge")
    data = listing.get("data") if isinstance(listing, dict) else None
    names = [str(model["id"]) for model in data or [] if isinstance(model, dict) and "id" in model]
    if names and name not in names:
        raise UserError(f"{url} has no model {name!r}; it has {similar_names(name, names)}", "judge")


async def _list_models(key: str) -> tuple[int, bytes]:
    """Ask for the models; return status and body. Raises UserError for a redirect."""
    from stages.judge.http_client import HTTPClient  # takes time to import

    async with HTTPClient(endpoint(), LIST_TIMEOUT) as client:
        response = await client.get(f"{base_url()}/models", headers={"Authorization": f"Bearer {key}"})
        return response.status_code, response.content
