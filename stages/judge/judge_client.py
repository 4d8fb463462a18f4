"""Sends requests to the judge, many at a time, and logs each reply at once. An endpoint may answer anything."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

from openai import APIStatusError, AsyncOpenAI, OpenAIError

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.judge.config import JudgeStage
from stages.judge.endpoint import base_url, endpoint
from stages.judge.http_client import HTTPClient
from stages.system.secrets import mask_secrets
from stages.system.terminal_text import first_line

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
        self.model, self.options = config.judge, config.options
        self.judges: Counter[str] = Counter()
        """Number of judgements by the judge that sent them, in JSON."""
        self.answer_log, self.on_judgements = answer_log, on_judgements

    def ask(
        self, requests: Mapping[str, list[dict[str, str]]], parse: Callable[[Reply], Any], **parameters: Any
    ) -> dict[str, tuple[Reply, Any]]:
        """Send the requests that are not in the log under their keys; return each reply with its verdict.

        A verdict is None if the reply is incomplete or a refusal, or if `parse` cannot read it.

        Raises:
            UserError: the endpoint refuses a request or cannot be reached.
        """
        return asyncio.run(self._ask(requests, parse, parameters))

    async def _ask(
        self, requests: Mapping[str, list[dict[str, str]]], parse: Callable[[Reply], Any], parameters: dict[str, Any]
    ) -> dict[str, tuple[Reply, Any]]:
        at_once = asyncio.Semaphore(self.options.concurrency)

        async def judge(key: str) -> tuple[Reply, Any]:
            async with at_once:
                for attempt in range(self.options.attempts):
                    log_key = f"{key} {attempt}"
                    if self.answer_log.get(log_key) is None:
                        self.answer_log.add({log_key: await self._request(client, requests[key], parameters)})
                    reply: Reply = self.answer_log.get(log_key)
                    verdict = parse(reply) if is_complete(reply, parameters.get("max_tokens")) else None
                    if verdict is not None:
                        break
            self.judges[json.dumps(judge_of(reply))] += 1
            self.on_judgements(1)
            return reply, verdict

        # The client repeats requests after 408, 409, 429, 5xx, cut connections and time-outs, and obeys Retry-After.
        async with (
            HTTPClient(endpoint(), self.options.timeout) as http_client,
            AsyncOpenAI(base_url=base_url(), max_retries=self.options.retries, http_client=http_client) as client,
        ):
            try:
                async with asyncio.TaskGroup() as running:
                    tasks = {key: running.create_task(judge(key)) for key in requests}
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            return {key: task.result() for key, task in tasks.items()}

    async def _request(self, client: AsyncOpenAI, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        create = client.chat.completions.create
        try:
            return _validated(await create(model=self.model, messages=cast(Any, messages), **parameters))
        except APIStatusError as error:
            raise UserError(f"judge: {endpoint()} answers {error.status_code}: {first_line(error)}") from None
        except OpenAIError as error:
            message = f"judge: {endpoint()} does not answer: {first_line(error)}"
            raise UserError(f"{message}; run the command again to resume") from None
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return UNREADABLE  # it is no JSON, or no chat completion

    def notes(self) -> list[str]:
        """Return a note if judgements are from several judges, as after a resumed step whose judge has changed."""
        if len(self.judges) < 2:
            return []
        counts = [f"{count} by {', '.join(json.loads(judge).values())}" for judge, count in self.judges.items()]
        return [f"{self.model}: judgements are not comparable, since the judge changed: {'; '.join(counts)}"]


def _validated(response: Any) -> Reply:
    """Return the first choice with what identifies the judge. Raises errors of any kind if it is no chat completion."""
    choice = response.choices[0].model_dump(mode="json")
    message = choice["message"]
    texts = [message.get("content"), message.get("refusal"), choice.get("finish_reason")]
    texts += [response.model, response.system_fingerprint]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("a text has another type")
    judge = dict(zip(JUDGE_KEYS, (response.model, response.system_fingerprint, endpoint()), strict=True))
    reply: Reply = json.loads(mask_secrets(json.dumps(choice | judge, allow_nan=False)))  # a server may echo the key
    return reply
