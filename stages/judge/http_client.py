"""HTTP to an endpoint that may answer anything: slowly, without end, or with a redirect that carries the key away."""

import asyncio
from importlib import import_module
from typing import Any

from openai import DefaultAsyncHttpxClient

from stages.base import UserError

_LIBRARY: Any = import_module(DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
"""httpx, or what openai uses in its place: only its own time-outs make openai send a request again."""
MOST_BYTES = 2**24
"""Longest body of a response. A longer one is replaced by an empty one."""


class HTTPClient(DefaultAsyncHttpxClient):
    """An HTTP client with one deadline for a whole response, a limit to its size, and no redirects."""

    def __init__(self, endpoint: str, seconds: float) -> None:
        super().__init__(follow_redirects=False)
        self._endpoint, self._seconds = endpoint, seconds

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request; return the response with its whole body. Raises UserError for a redirect."""
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **options | {"stream": True, "follow_redirects": False})
                body = await _read(response)
        except TimeoutError:
            raise _LIBRARY.ReadTimeout(f"no response within {self._seconds:g} seconds", request=request) from None
        if response.is_redirect:
            message = f"redirects to {response.headers.get('location')}; if you trust that, set OPENAI_BASE_URL to it"
            raise UserError(f"judge: {self._endpoint} {message}")
        headers = {k: v for k, v in response.headers.items() if k not in ("content-encoding", "content-length")}
        return _LIBRARY.Response(response.status_code, headers=headers, content=body, request=request)


async def _read(response: Any) -> bytes:
    body = b""
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MOST_BYTES:
                return b""
    finally:
        await response.aclose()
    return body
