"""Scores and generates token sequences with a causal language model, for all stages that need one.

It computes shared prefixes once, and many answers in one pass. Some models compute something else that way; self_check
detects them, and they answer requests one by one.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.base import UserError
from stages.data.chat_rendering import TEMPLATE_SECONDS
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.config import BUDGETS, GENERATION_TOKENS
from stages.inference.generation import generate
from stages.inference.prefix_tree import Tokens
from stages.inference.requests import GenerationRequest, Score, ScoreRequest, key_of
from stages.inference.scoring import TreeScorer
from stages.inference.self_check import generate_plainly, score_plainly, why_plain
from stages.models.generation_config import remove_generation_defaults
from stages.models.tokenizer import remove_appended_eos
from stages.system.limits import LimitExceeded, limited

LEAST_BUDGET = 32
"""Smallest budget that is tried when memory runs out."""


Add = Callable[[dict[str, Any]], None]
"""Takes answers by the key of their request, as soon as there are some."""


class Engine:
    """A causal language model with its tokenizer, both of which it changes.

    Args:
        name: what messages call the model.
        budget: tokens of a pass; None for the default of the device.
        log: keeps answers, so that a resumed step asks for none again.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        name: str,
        budget: int | None = None,
        log: AnswerLog | None = None,
    ) -> None:
        self.tokenizer, self.model, self.name = tokenizer, model.eval(), name
        self.log = log or AnswerLog()
        remove_appended_eos(self.tokenizer)
        self.removed_defaults = remove_generation_defaults(self.model)
        """What the checkpoint's generation config would have set."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos_ids = eos if isinstance(eos, list) else [eos, self.tokenizer.eos_token_id]
        self.eos_ids = {token for token in eos_ids if token is not None}
        """Tokens that end an answer."""
        self.max_length: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        """Longest sequence in tokens. None if the model's config names none."""
        self.budget = budget or BUDGETS["cuda" if torch.cuda.is_available() else "cpu"]
        self._stop_lengths: dict[tuple[str, ...], int] = {}
        """Texts that end an answer -> tokens at its end in which they can be."""
        self.plain: dict[str, str | None] = {}
        """`score` and `generate`, once checked -> why the model answers requests one by one; None if it does not."""

    def environment(self) -> dict[str, Any]:
        """Describe library, dtype, device, context length and the engine's ways for a stage's metrics."""
        return {
            "transformers": metadata.version("transformers"),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "max_length": self.max_length,
            "removed_generation_defaults": self.removed_defaults,
        }

    def notes(self) -> list[str]:
        """Return a note for each way in which the model cannot share passes."""
        reasons = {reason: name for name, reason in self.plain.items() if reason}
        return [f"{self.name} answers requests one by one, which takes longer: {reason}" for reason in reasons]

    def encode(self, messages: Sequence[dict[str, str]] | str) -> Tokens:
        """Tokenise plain text, or messages in the chat template with its generation prompt."""
        if isinstance(messages, str):
            return tuple(self.tokenizer(messages)["input_ids"])
        if not self.tokenizer.chat_template:
            raise UserError(
                f"options.apply_chat_template: the tokenizer of {self.name} has no chat template; set it to false, or"
                " add a template to the model"
            )
        try:
            with limited(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (Exception, LimitExceeded) as error:  # templates raise errors of any type
            raise UserError(f"the chat template of {self.name} rejects the prompt: {error}") from None
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def check_length(self, prompt: Tokens, max_new_tokens: int, place: str) -> None:
        """Raise UserError, which names `place`, if `prompt` and its answer exceed the model's context."""
        if self.max_length is not None and len(prompt) + max_new_tokens > self.max_length:
            raise UserError(
                f"{place}: {len(prompt)} tokens and an answer of {max_new_tokens} are more than the {self.max_length}"
                f" of {self.name}'s context; shorten the prompt, or lower max_new_tokens"
            )

    def score(
        self,
        requests: Sequence[ScoreRequest],
        on_answers: Callable[[int], None] = lambda count: None,
        softmax_dtype: torch.dtype | None = torch.float32,
    ) -> list[Score]:
        """Score the answers of requests, in their order.

        Args:
            on_answers: gets how many further requests have their answer.
            softmax_dtype: dtype in which log-probabilities are computed; None for the model's own.
        """
        return [Score(*each) for each in self._answer_all(requests, on_answers, self._score, softmax_dtype)]

    def _score(
        self, requests: dict[str, ScoreRequest], answers: Container[str], add: Add, softmax_dtype: torch.dtype | None
    ) -> None:
        def run(budget: int) -> None:
            TreeScorer(self.model, requests, budget, softmax_dtype, add).run(done=answers)

        if not self.is_plain("score", max((request.tokens for request in requests.values()), key=len)):
            self._within_memory(run)
            return
        for key, request in requests.items():
            if key not in answers:
                add({key: score_plainly(self.model, request)})

    def generate(
        self, requests: Sequence[GenerationRequest], on_answers: Callable[[int], None] = lambda count: None
    ) -> list[list[int]]:
        """Return the tokens of an answer to each request."""
        return self._answer_all(requests, on_answers, self._generate)

    def _generate(self, requests: dict[str, GenerationRequest], answers: Container[str], add: Add) -> None:
        def run(budget: int) -> None:
            for batch in self._batches(requests, budget):
                if not all(key in answers for key in batch):
                    add(dict(zip(batch, self._answer([requests[key] for key in batch]), strict=True)))

        self._within_memory(run)

    def _answer_all(
        self, requests: Sequence[Any], on_answers: Callable[[int], None], compute: Callable[..., None], *options: Any
    ) -> list[Any]:
        """The answers to requests, in their order. `compute(requests, answers, add, *options)` adds what the log lacks.

        The three are keyed by key_of: equal requests have one answer.
        """
        keys = [key_of(request) for request in requests]
        by_key, counts = dict(zip(keys, requests, strict=True)), Counter(keys)
        answers = {key: kept for key in by_key if (kept := self.log.get(key))}

        def add(new: dict[str, Any]) -> None:
            self.log.add(new)
            answers.update(new)
            on_answers(sum(counts[key] for key in new))

        on_answers(sum(counts[key] for key in answers))
        if len(answers) < len(by_key):
            compute(by_key, answers, add, *options)
        return [answers[key] for key in keys]

    def _answer(self, requests: list[GenerationRequest]) -> list[list[int]]:
        """Generate the answers of a batch, or of one request in the way of transformers."""
        if self.plain["generate"]:
            return [generate_plainly(self.model, requests[0], self.tokenizer, sorted(self.eos_ids))]
        *_, answers = generate(self.model, requests, self._is_last)
        return answers

    def stream(self, request: GenerationRequest) -> Iterator[int]:
        """Yield the tokens of the answer to one request as they come."""
        return (answer[-1] for (answer,) in generate(self.model, [request], self._is_last))

    def _is_last(self, request: GenerationRequest, answer: list[int]) -> bool:
        """Whether an answer ends with its last token."""
        if answer[-1] in self.eos_ids or len(answer) >= request.limit:
            return True
        if not request.stops:
            return False
        if request.stops not in self._stop_lengths:
            lengths = [len(self.tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in request.stops]
            self._stop_lengths[request.stops] = max(lengths) + 2
        ending = self.tokenizer.decode(answer[-self._stop_lengths[request.stops] :])
        return any(stop in ending for stop in request.stops)

    def _batches(self, requests: dict[str, GenerationRequest], budget: int) -> Iterator[list[str]]:
        """Group the keys of requests, the longest first; plain ones alone."""
        order = sorted(requests, key=lambda key: (-len(requests[key].prompt) - requests[key].limit, key))
        most = 1 if self.is_plain("generate", requests[order[0]].prompt) else None
        start = 0
        while start < len(order):
            longest = len(requests[order[start]].prompt) + requests[order[start]].limit
            count = most or max(1, GENERATION_TOKENS * budget // longest)
            yield order[start : start + count]
            start += count

    def is_plain(self, name: str, longest: Tokens) -> bool:
        """Whether the model has to `score` or `generate` one by one; checked once, with the longest of the requests."""
        if name not in self.plain:
            limit = self.max_length or len(longest)
            self.plain[name] = why_plain(self.model, longest[-limit:], generates=name == "generate")
        return self.plain[name] is not None

    def _within_memory(self, run: Callable[[int], None]) -> None:
        """Call `run` with the budget, and with half of it as long as memory runs out."""
        while True:
            try:
                return run(self.budget)
            except torch.OutOfMemoryError:
                if self.budget <= LEAST_BUDGET:
                    text = f"{self.name}: a pass of {self.budget} tokens needs more memory than there is"
                    raise torch.OutOfMemoryError(text) from None
            torch.cuda.empty_cache()
            self.budget //= 2
