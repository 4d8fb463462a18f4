"""The model under test: lm-eval's own, which keeps every answer until the step is done and counts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM, hash_args
from lm_eval.models.huggingface import HFLM

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.lm_eval.config import LMEvalStage
from stages.models.model_folder import TRUST

Answer = str | float | tuple[float, bool]
"""Generated text, the score of a whole text, or the score of a continuation and whether it is the likeliest."""


class KeepingHook(CacheHook):
    """lm-eval calls its answer cache's hook once per answered request."""

    def __init__(self, kept: AnswerLog, answered: Callable[[int], None]) -> None:
        super().__init__(None)
        self.kept, self.answered = kept, answered

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One request was answered."""
        self.kept.add(hash_args(attr, req), res)
        self.answered(1)


class KeepingModel(TemplateLM):
    """What a model of lm-eval needs so that an interrupted evaluation goes on with the answers it has.

    lm-eval's own answer cache goes by a path, and so could serve those of a model that has since changed; these lie
    with the step's checkpoints, by its fingerprint, and go when it is published. They are kept by whole batches, so
    that what is left makes the batches that it would have made, and the same scores to the last bit.
    """

    kept: AnswerLog
    answered: Callable[[int], None]
    cut: set[tuple[str, int]]
    """Task and number of each item in this process that is longer than the model takes."""

    def keep(self, file: Path, answered: Callable[[int], None]) -> None:
        """Keep answers in `file`, and call `answered` with how many more are there."""
        self.kept, self.answered, self.cut = AnswerLog(file), answered, set()
        self.set_cache_hook(KeepingHook(self.kept, answered))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of continuations."""
        return self._go_on("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Scores of whole texts."""
        return self._go_on("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generated answers."""
        return self._go_on("generate_until", requests, super().generate_until)

    def _model_generate(self, *arguments: Any, **settings: Any) -> Any:
        self.kept.flush()  # a batch begins, so the one before is whole
        return super()._model_generate(*arguments, **settings)

    def _go_on(self, kind: str, requests: list[Instance], answer: Callable[..., list[Any]]) -> list[Any]:
        """The answers, of which those not kept are asked for, without lm-eval's progress bars."""
        keys = [hash_args(kind, request.args) for request in requests]
        # each sampled answer is another one, so none stands for the next
        drawn = [kind == "generate_until" and bool(request.args[1].get("do_sample")) for request in requests]
        known = {key: self.kept[key] for key, new in zip(keys, drawn, strict=True) if not new and key in self.kept}
        left = [request for request, key in zip(requests, keys, strict=True) if key not in known]
        self.answered(len(requests) - len(left))
        new = iter(answer(left, disable_tqdm=True) if left else [])
        self.kept.flush()
        self.cut |= {
            (str(request.task_name), int(request.doc_id or 0))
            for request in requests
            if _cut_key(kind, request.args) in self.kept
        }
        return [_answer(known[key]) if key in known else next(new) for key in keys]


def _cut_key(kind: str, arguments: Any) -> str:
    """Under what a prompt is kept that did not fit: with its continuation, or alone where the answer is generated."""
    return hash_args(f"cut {kind}", arguments[:1] if kind == "generate_until" else arguments)


def _answer(value: Any) -> Answer:
    """An answer as the model gave it: JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


class HFModel(KeepingModel, HFLM):
    """lm-eval's Hugging Face model; several processes share the items on CPUs and over machines, too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if accelerator := getattr(self, "accelerator", None):
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _model_call(self, *arguments: Any, **settings: Any) -> Any:
        self.kept.flush()
        return super()._model_call(*arguments, **settings)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **settings: Any) -> Any:
        """lm-eval cuts what is too long from the left, and says so in the log alone: it is noted here."""
        for given, context, continuation in requests:
            if given and len(context) + len(continuation) > self.max_length + 1:
                self.kept.add(_cut_key("loglikelihood", given), value=True)
        return super()._loglikelihood_tokens(requests, *arguments, **settings)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> Any:
        """As above, for prompts that are answered by generation."""
        encoded = super().tok_batch_encode(strings, padding_side, left_truncate_len, **settings)
        if left_truncate_len and encoded[0].shape[1] == left_truncate_len:
            for string in strings:
                if len(self.tok_encode(string)) > left_truncate_len:
                    self.kept.add(_cut_key("generate_until", (string,)), value=True)
        return encoded


def load_model(path: Path, config: LMEvalStage) -> KeepingModel:
    """The checkpoint and tokenizer in `path`: safetensors only, and the folder's own code only where it is trusted.

    Raises UserError.
    """
    options, name = config.options, config.models[0]
    arguments: dict[str, Any] = {
        "pretrained": str(path),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "trust_remote_code": config.trust_remote_code,
    }
    gpus = config.resources.gpus or 1
    try:
        model = _vllm(arguments, gpus) if options.backend == "vllm" else _hf(arguments, gpus, config.launch is None)
    except (OSError, ValueError) as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise UserError(f"{name} comes with its own Python files; if you trust them, {TRUST}") from None
    if options.apply_chat_template and not cast(Any, model.tokenizer).chat_template:
        raise UserError(
            f"options.apply_chat_template: the tokenizer of {name} has no chat template; "
            "evaluate it without, or give the model one"
        )
    return model


def _hf(arguments: dict[str, Any], gpus: int, alone: bool) -> KeepingModel:
    split = alone and gpus > 1 and torch.cuda.is_available()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFModel(**arguments, device=device, use_safetensors=True, parallelize=split)


def _vllm(arguments: dict[str, Any], gpus: int) -> KeepingModel:
    """lm-eval's vLLM model over so many GPUs; vLLM chooses its own batches. Raises UserError."""
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise UserError(f"options.backend: vllm cannot be loaded ({error}); pip install -e '.[vllm]'") from None
    arguments |= {"batch_size": "auto", "tensor_parallel_size": gpus, "load_format": "safetensors"}
    return cast(KeepingModel, type("VLLMModel", (KeepingModel, VLLM), {})(**arguments))
