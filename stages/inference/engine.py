"""Scores and generates token sequences with a causal language model, for all stages that need one.

It computes shared prefixes once, and many answers in one pass. Some models compute something else that way; self_check
detects them, and they answer requests one by one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
from stages.models.model_folder import why_not_loaded
from stages.models.tokenizer import remove_appended_eos
from stages.system.limits import LimitExceeded, limited

LEAST_BUDGET = 32
"""Smallest budget that is tried when memory runs out."""


class Engine:
    """A checkpoint with its tokenizer, on the GPUs of this process or on the CPU.

    Args:
        path: a folder that from_pretrained loads. Weights are read from safetensors only.
        name: what messages call the model.
        dtype: dtype of the weights: auto, float32, bfloat16 or float16.
        budget: tokens of a pass; None for the default of the device.
        log: keeps answers, so that a resumed step asks for none again.
        gpus: GPUs that the model is split over, or the share of one that it may use.
        loaded: a tokenizer and a model in memory, instead of those in `path`.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        dtype: str,
        trust_remote_code: bool,
        budget: int | None = None,
        log: AnswerLog | None = None,
        gpus: float = 1,
        loaded: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None,
    ) -> None:
        self.name, self._log = name, log
        self.tokenizer: PreTrainedTokenizerBase
        self.model: PreTrainedModel
        try:
            self.tokenizer, self.model = loaded or (
                AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code),
                self._load(path, dtype, trust_remote_code, gpus),
            )
            self.model.eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be loaded: {why_not_loaded(error)}") from None
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

    def _load(self, path: Path, dtype: str, trust_remote_code: bool, gpus: float) -> Any:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if gpus > 1:
            return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, device_map="auto", **options)
        model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
        return model.to(PartialState().device)

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
        keys = [key_of(request) for request in requests]
        answers = {key: Score(*kept) for key in set(keys) if (kept := self.kept(key))}
        on_answers(sum(key in answers for key in keys))

        done = [key in answers for key in keys]

        def add(scores: dict[int, Score]) -> None:
            for number in scores:
                done[number] = True
            self.keep({keys[number]: score for number, score in scores.items()})
            answers.update({keys[number]: score for number, score in scores.items()})
            on_answers(len(scores))

        if not all(done):
            self._score(requests, done, softmax_dtype, add)
        return [answers[key] for key in keys]

    def _score(
        self,
        requests: Sequence[ScoreRequest],
        done: Sequence[bool],
        softmax_dtype: torch.dtype | None,
        add: Callable[[dict[int, Score]], None],
    ) -> None:
        """Score the requests that are not done; `add` gets scores by the number of their request."""
        if self.is_plain("score", max((request.tokens for request in requests), key=len)):
            for number, request in enumerate(requests):
                if not done[number]:
                    add({number: score_plainly(self.model, request)})
        else:
            self._within_memory(lambda budget: TreeScorer(self.model, requests, budget, softmax_dtype, add).run(done))

    def generate(
        self, requests: Sequence[GenerationRequest], on_answers: Callable[[int], None] = lambda count: None
    ) -> list[list[int]]:
        """Return the tokens of an answer to each request."""
        keys = [key_of(request) for request in requests]
        by_key, counts = dict(zip(keys, requests, strict=True)), Counter(keys)
        answers = {key: kept for key in by_key if (kept := self.kept(key))}
        on_answers(sum(key in answers for key in keys))

        def run(budget: int) -> None:
            for batch in self._batches(by_key, budget):
                if not all(key in answers for key in batch):
                    new = self._answer([by_key[key] for key in batch])
                    self.keep(dict(zip(batch, new, strict=True)))
                    answers.update(zip(batch, new, strict=True))
                    on_answers(sum(counts[key] for key in batch))

        if not all(key in answers for key in keys):
            self._within_memory(run)
        return [answers[key] for key in keys]

    def stream(self, request: GenerationRequest) -> Iterator[int]:
        """Yield the tokens of the answer to one request as they come."""
        answer: list[int] = []
        for _, token in generate(self.model, [request], lambda _, token: self._is_last(request, answer)):
            answer.append(token)
            yield token

    def _answer(self, requests: list[GenerationRequest]) -> list[list[int]]:
        """Generate the answers of a batch, or of one request in the way of transformers."""
        if self.plain["generate"]:
            return [generate_plainly(self.model, requests[0], self.tokenizer, sorted(self.eos_ids))]
        answers: list[list[int]] = [[] for _ in requests]
        for number, token in generate(
            self.model, requests, lambda number, _: self._is_last(requests[number], answers[number])
        ):
            answers[number].append(token)
        return answers

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

    def kept(self, key: str) -> Any:
        """Return an answer of the log; None if there is none."""
        return self._log[key] if self._log and key in self._log else None

    def keep(self, answers: dict[str, Any]) -> None:
        """Add answers to the log, if there is one."""
        if self._log:
            for key, answer in answers.items():
                self._log.add(key, answer)
            self._log.flush()

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
