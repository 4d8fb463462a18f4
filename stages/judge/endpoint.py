"""An OpenAI-compatible endpoint: whether it can judge, and many requests at a time.

The endpoint is the one that OPENAI_BASE_URL names, OpenAI's own where it is not set; the key is OPENAI_API_KEY.
Neither is ever written down.
"""

from __future__ import annotations

import difflib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, cast

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog

if TYPE_CHECKING:
    from stages.judge.config import Options

Choice = dict[str, Any]
"""The first choice of an answer, as the API has it, and under `model` what answered."""

OPENAI = "https://api.openai.com/v1"
PATIENCE = 20.0
"""Seconds that the endpoint has to say which models it has."""


def base_url() -> str:
    """Where requests go."""
    return os.environ.get("OPENAI_BASE_URL", OPENAI).rstrip("/")


def require_model(name: str) -> None:
    """Raise UserError where the endpoint is down, refuses the key or does not have the model."""
    url = f"{base_url()}/models"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"OPENAI_BASE_URL is {base_url()!r}, no http or https address", "judge")
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError(
            "the environment variable OPENAI_API_KEY is not set; an endpoint without keys takes any", "judge"
        )
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            listed = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(f"{base_url()} refuses the key in OPENAI_API_KEY ({error.code})", "judge") from None
        if error.code in (404, 405):
            return  # it lists no models; the first request will tell
        raise UserError(f"{base_url()} answers {error.code} {error.reason}", "judge") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{base_url()} (OPENAI_BASE_URL) cannot be reached: {error}", "judge") from None
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [str(model["id"]) for model in data or [] if isinstance(model, dict) and "id" in model]
    if names and name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:5]
        raise UserError(f"{base_url()} has no model {name!r}; it has {', '.join(near)}", "judge")


class Judge:
    """The judging model.

    Args:
        model: as the endpoint knows it.
        options: concurrency, timeout, retries and attempts of the recipe.
        kept: every answer, by a key of its request, as it comes.
        answered: called after every request that was answered.
    """

    def __init__(self, model: str, options: Options, kept: AnswerLog, answered: Callable[[], None]) -> None:
        from openai import OpenAI

        self.model, self.options, self.kept, self.answered = model, options, kept, answered
        # the library sends again after 408, 409, 429, 5xx, cut connections and time-outs, and heeds Retry-After
        self.client = OpenAI(base_url=base_url(), max_retries=options.retries, timeout=options.timeout)

    def ask(
        self, requests: Mapping[str, list[dict[str, str]]], parse: Callable[[Choice], Any], **parameters: Any
    ) -> dict[str, tuple[Choice, Any]]:
        """The judge's answer to each request, and what `parse` makes of it.

        Args:
            requests: key -> messages; what is kept under the key is not asked for again.
            parse: returns None for an answer that cannot be read; it is asked for again, up to `attempts` in all.
            parameters: of the API: max_tokens, temperature ...

        Raises:
            UserError: the endpoint refuses, or cannot be reached at last.
        """
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            waiting = {
                key: pool.submit(self._judged, key, messages, parse, parameters) for key, messages in requests.items()
            }
            try:
                for done in as_completed(waiting.values()):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return {key: done.result() for key, done in waiting.items()}

    def _judged(
        self, key: str, messages: list[dict[str, str]], parse: Callable[[Choice], Any], parameters: Any
    ) -> tuple[Choice, Any]:
        for attempt in range(self.options.attempts):
            name = f"{key} {attempt}"
            if name not in self.kept:
                self.kept.add(name, self._choice(messages, parameters))
                self.kept.flush()
            choice = self.kept[name]
            if (verdict := parse(choice)) is not None:
                break
        self.answered()
        return choice, verdict

    def _choice(self, messages: list[dict[str, str]], parameters: Any) -> Choice:
        import openai

        try:
            answer = self.client.chat.completions.create(model=self.model, messages=cast(Any, messages), **parameters)
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            return {"message": {"content": ""}}  # nothing that can be read, so it is asked for again
        except openai.APIStatusError as error:
            raise UserError(f"judge: {base_url()} answers {error.status_code}: {_first_line(error)}") from None
        except openai.OpenAIError as error:
            raise UserError(
                f"judge: {base_url()} does not answer: {_first_line(error)}; run it again to go on with what is there"
            ) from None
        if not getattr(answer, "choices", None):
            return {"message": {"content": ""}}
        return answer.choices[0].model_dump(mode="json") | {"model": answer.model}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
