"""Sends requests to the judge, many at a time, and logs each reply at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.judge.config import JudgeStage
from stages.judge.endpoint import base_url, endpoint

UNREADABLE = {"message": {"content": ""}}
"""Replaces a response that is not a chat completion. No parser can read it, so the request is repeated."""


Reply = dict[str, Any]
"""First choice of the API's response, and what identifies the judge: see `JUDGE_KEYS`."""
JUDGE_KEYS = ("model", "system_fingerprint", "endpoint")
"""Keys of a reply: the model and the version of it that responded, by its own word, and the endpoint."""


def text_of(reply: Reply) -> str:
    """Return the reply's message, or an empty string."""
    return reply["message"].get("content") or ""


def judge_of(reply: Reply) -> dict[str, str]:
    """Return which judge sent the reply."""
    return {key: reply[key] for key in JUDGE_KEYS if reply.get(key)}


def is_complete(reply: Reply, max_tokens: int | None) -> bool:
    """Whether the judge ended its reply itself and did not refuse. A verdict of one token cannot be cut."""
    reason = reply.get("finish_reason")
    is_cut = reason == "content_filter" or (reason == "length" and max_tokens != 1)
    return not is_cut and not reply["message"].get("refusal")


class Judge:
    """The judging model. Calls `on_judgements(1)` after each request that has its reply."""

    def __init__(self, config: JudgeStage, answer_log: AnswerLog, on_judgements: Callable[[int], None]) -> None:
        from openai import OpenAI

        self.model, self.options = config.judge, config.options
        self.judges: Counter[str] = Counter()
        """Number of judgements by the judge that sent them, in JSON."""
        self.answer_log, self.on_judgements = answer_log, on_judgements
        # The client repeats requests after 408, 409, 429, 5xx, cut connections and time-outs, and obeys Retry-After.
        self.client = OpenAI(base_url=base_url(), max_retries=self.options.retries, timeout=self.options.timeout)

    def ask(
        self, requests: Mapping[str, list[dict[str, str]]], parse: Callable[[Reply], Any], **parameters: Any
    ) -> dict[str, tuple[Reply, Any]]:
        """Send the requests that are not in the log under their keys; return each reply with its verdict.

        A verdict is None if the reply is incomplete or a refusal, or if `parse` cannot read it.

        Raises:
            UserError: the endpoint refuses a request or cannot be reached.
        """
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = {key: pool.submit(self._judge, key, requests[key], parse, parameters) for key in requests}
            try:
                for future in as_completed(futures.values()):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return {key: future.result() for key, future in futures.items()}

    def _judge(
        self, key: str, messages: list[dict[str, str]], parse: Callable[[Reply], Any], parameters: dict[str, Any]
    ) -> tuple[Reply, Any]:
        for attempt in range(self.options.attempts):
            log_key = f"{key} {attempt}"
            if log_key not in self.answer_log:
                self.answer_log.add(log_key, self._request(messages, parameters))
                self.answer_log.flush()
            reply: Reply = self.answer_log[log_key]
            verdict = parse(reply) if is_complete(reply, parameters.get("max_tokens")) else None
            if verdict is not None:
                break
        self.judges[json.dumps(judge_of(reply))] += 1
        self.on_judgements(1)
        return reply, verdict

    def _request(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        import openai

        try:
            response = self.client.chat.completions.create(model=self.model, messages=cast(Any, messages), **parameters)
        except (openai.APIResponseValidationError, json.JSONDecodeError):
            return UNREADABLE
        except openai.APIStatusError as error:
            raise UserError(f"judge: {base_url()} answers {error.status_code}: {_first_line(error)}") from None
        except openai.OpenAIError as error:
            message = f"judge: {base_url()} does not answer: {_first_line(error)}"
            raise UserError(f"{message}; run the command again to resume") from None
        if not getattr(response, "choices", None):  # the client returns a response that is not JSON as a string
            return UNREADABLE
        judge = {"model": response.model, "system_fingerprint": response.system_fingerprint, "endpoint": endpoint()}
        return response.choices[0].model_dump(mode="json") | judge

    def notes(self) -> list[str]:
        """Return a note if judgements are from several judges, as after a resumed step whose judge has changed."""
        if len(self.judges) < 2:
            return []
        counts = [f"{count} by {', '.join(json.loads(judge).values())}" for judge, count in self.judges.items()]
        return [f"{self.model}: judgements are not comparable, since the judge changed: {'; '.join(counts)}"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
