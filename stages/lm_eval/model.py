"""lm-eval's Hugging Face model, with the engine in place of its batches; texts become tokens and back in lm-eval's way.

What the engine does not do, lm-eval does: sampling and beams, models that cannot share passes, and everything with
`engine: lm_eval`. `_loglikelihood_tokens` has no public counterpart: tests/stages/lm_eval/test_lm_eval_internals.py
fails when an update of lm-eval changes it.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.inference.engine import Engine
from stages.inference.loading import load_engine
from stages.inference.requests import GenerationRequest, ScoreRequest
from stages.lm_eval.config import LMEvalStage
from stages.system.library_versions import require_version

require_version("lm_eval", "0.4")

_GREEDY = {"do_sample": False, "temperature": 0.0}
"""The only settings of generation that requests to the engine have."""
_PLAIN_REQUESTS = 256
"""Requests that go lm-eval's own way at a time; a resumed step asks again for the last of such groups."""
_TOKENS_PER_ROW = 64
"""Tokens of the engine's budget for each row of lm-eval's own batches."""

TokenPairs = Sequence[tuple[Any, list[int], list[int]]]
"""The texts of a request or None, the tokens of its prompt, and those of its answer."""


class EngineLM(HFLM):
    """Counts its answers by `on_answers`. Several processes share the items, on CPUs and across machines, too."""

    def __init__(
        self,
        engine: Engine,
        config: LMEvalStage,
        on_answers: Callable[[int], None],
        accelerator: Accelerator | None = None,
    ) -> None:
        if accelerator and accelerator.num_processes > 1:
            self.accelerator = accelerator
        rows = max(1, engine.budget // _TOKENS_PER_ROW)
        super().__init__(
            engine.model, tokenizer=engine.tokenizer, max_length=config.options.max_length, batch_size=rows
        )
        self.engine, self.on_answers, self._asked = engine, on_answers, list[Instance]()
        self._is_plain = config.options.engine == "lm_eval"
        self.truncated: set[tuple[str, int]] = set()
        """Task and document number of each of this process's items that exceeds the model's context."""

    @property
    def rank(self) -> int:
        """Index of this process among all machines'; lm-eval's own is 0 for a model that is loaded already."""
        return PartialState().process_index

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return PartialState().num_processes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [[(None, *pair) for pair in self._windows(request.args[0])] for request in requests]
        self._asked = [request for request, each in zip(requests, windows, strict=True) for _ in each]
        scores = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Split a text as lm-eval does: each token is scored once, with the tokens before it that fit the context."""
        tokens, start = self.tok_encode(text), self.prefix_token_id
        yield from map(make_disjoint_window, get_rolling_token_windows(tokens, start, self.max_length, context_len=1))

    def _loglikelihood_tokens(
        self, requests: TokenPairs, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        limit = self.max_length + 1
        asked = []
        for request, (_, prompt, answer) in zip(self._asked, requests, strict=True):
            if len(prompt) + len(answer) > limit:  # the start of the prompt is left out
                self._note_truncated(request)
            asked.append(ScoreRequest(tuple((prompt + answer)[-limit : -len(answer)]), tuple(answer)))
        if self._is_plain or self.engine.is_plain("score", max((each.tokens for each in asked), key=len)):
            return self._plainly("loglikelihood", requests, super()._loglikelihood_tokens)
        return [(*score,) for score in self.engine.score(asked, self.on_answers, self.softmax_dtype)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        shared: dict[int, GenerationRequest] = {}
        for number, request in enumerate(requests):
            settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
            stops = tuple(handle_stop_sequences(settings.pop("until", None), eos=eos))
            limit = settings.pop("max_gen_toks")
            (row,), _ = self.tok_batch_encode([request.args[0]], truncation=bool(self.truncation))
            prompt = tuple(row.tolist())
            if len(prompt) > (room := self.max_length - limit):
                self._note_truncated(request)
            if settings.items() <= _GREEDY.items():
                shared[number] = GenerationRequest(prompt[-room:], limit, stops)
        longest = max((request.prompt for request in shared.values()), key=len, default=())
        if self._is_plain or not shared or self.engine.is_plain("generate", longest):
            return self._plainly("generate", requests, super().generate_until)
        answers = self.engine.generate(list(shared.values()), self.on_answers)
        texts = {
            number: postprocess_generated_text(self.tok_decode(answer), list(request.stops), None)
            for (number, request), answer in zip(shared.items(), answers, strict=True)
        }
        rest = [request for number, request in enumerate(requests) if number not in texts]
        others = iter(self._plainly("generate", rest, super().generate_until))
        return [texts[number] if number in texts else next(others) for number in range(len(requests))]

    def _plainly(self, method: str, requests: Sequence[Any], answer: Callable[..., list[Any]]) -> list[Any]:
        """Let lm-eval answer requests, in groups that the log keeps. The samples of later groups have other seeds."""
        answers: list[Any] = []
        for start in range(0, len(requests), _PLAIN_REQUESTS):
            group, key = requests[start : start + _PLAIN_REQUESTS], f"{method} {len(requests)} {start}"
            if start:
                torch.manual_seed(zlib.crc32(key.encode()))
            new = self.engine.log.get(key)
            if new is None:
                new = answer(group, disable_tqdm=True)
                self.engine.log.add({key: new})
            self.on_answers(len(group))
            answers += new
        return [tuple(each) if isinstance(each, list) else each for each in answers]  # JSON has no tuples

    def _note_truncated(self, request: Instance) -> None:
        self.truncated.add((str(request.task_name), int(request.doc_id or 0)))


def load_model(path: Path, config: LMEvalStage, checkpoints: Path, on_answers: Callable[[int], None]) -> EngineLM:
    """Load the checkpoint and tokenizer in `path`. Raises UserError."""
    options, name = config.options, config.models[0]
    accelerator = Accelerator()  # before the engine asks for the device: it joins the processes, on CPUs as well
    log = AnswerLog(checkpoints / f"answers-{PartialState().process_index}.jsonl")
    engine = load_engine(config, path, log)
    if options.apply_chat_template and not engine.tokenizer.chat_template:
        raise UserError(f"options.apply_chat_template: the tokenizer of {name} has no chat template; set it to false")
    return EngineLM(engine, config, on_answers, accelerator)
