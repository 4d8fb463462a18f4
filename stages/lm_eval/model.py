"""lm-eval's models, extended to resume an interrupted evaluation and to count truncated items.

Only this module overrides private methods of lm-eval, as they have no public counterpart: `_model_call` and
`_model_generate` start a batch, `_loglikelihood_tokens` truncates. tests/stages/lm_eval/test_lm_eval_internals.py fails
when an update of lm-eval changes them.
"""

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM, hash_args
from lm_eval.models.huggingface import HFLM

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.lm_eval.config import LMEvalStage
from stages.models.appended_eos import remove_appended_eos
from stages.models.generation_config import remove_generation_defaults
from stages.models.model_folder import TRUST
from stages.system.library_versions import require_version

require_version("lm_eval", "0.4")


RANDOM_STATE = "random state"
"""The log's key for the generators after the last batch with sampled answers."""


class AnswerLogHook(CacheHook):
    def __init__(self, answer_log: AnswerLog, on_answers: Callable[[int], None]) -> None:
        super().__init__(None)
        self.answer_log, self.on_answers = answer_log, on_answers
        self.repeats: Counter[str] = Counter()
        """Key of a request for generation -> how often it was answered."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        key = hash_args(attr, req)
        if attr == "generate_until":  # the same request again is another repeat, which may be sampled
            self.repeats[key] += 1
            key = _repeat_key(key, self.repeats[key])
            if req[1].get("do_sample") or req[1].get("temperature"):
                self.answer_log.add(RANDOM_STATE, _random_state())
        self.answer_log.add(key, res)
        self.on_answers(1)


class ResumableModel(TemplateLM):
    """Mixin for a model of lm-eval that reuses the answers of an interrupted evaluation.

    lm-eval's own cache is keyed by the model's path, so it could return the answers of a model that has changed since.
    This log is in the step's checkpoint folder, which belongs to one fingerprint. It is written batch by batch: the
    remaining requests form the same batches as without the interruption, and give the same scores to the last bit.
    """

    def __init__(self, checkpoints: Path, on_answers: Callable[[int], None], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.on_answers = on_answers
        self.answer_log = AnswerLog(checkpoints / f"answers-{self.rank}.jsonl")
        self.removed_defaults: dict[str, Any] = {}
        """What the checkpoint's generation config would have set."""
        self.truncated: set[tuple[str, int]] = set()
        """Task and document number of each of this process's items that exceeds the model's context."""
        self.hook = AnswerLogHook(self.answer_log, on_answers)
        self.set_cache_hook(self.hook)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._resume("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._resume("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._resume("generate_until", requests, super().generate_until)

    def _model_generate(self, *arguments: Any, **settings: Any) -> Any:
        self.answer_log.flush()  # the batch before is complete
        return super()._model_generate(*arguments, **settings)

    def _resume(self, method: str, requests: list[Instance], answer: Callable[..., list[Any]]) -> list[Any]:
        """Answer the requests that are not in the log, without lm-eval's progress bars."""
        keys, repeats = [hash_args(method, request.args) for request in requests], Counter[str]()
        logged: dict[str, Any] = {}
        for number, key in enumerate(keys if method == "generate_until" else ()):
            repeats[key] += 1
            keys[number] = _repeat_key(key, repeats[key])
        for key in keys:
            if key in self.answer_log:
                answers = self.answer_log[key]
                # JSON has no tuples: a list is the log-likelihood of a continuation, and whether it is the greedy one
                logged[key] = tuple(answers) if isinstance(answers, list) else answers
        self.hook.repeats = Counter(key.rpartition(" ")[0] for key in logged)
        if RANDOM_STATE in self.answer_log:
            _set_random_state(self.answer_log[RANDOM_STATE])
        remaining = [request for request, key in zip(requests, keys, strict=True) if key not in logged]
        self.on_answers(len(requests) - len(remaining))
        new = iter(answer(remaining, disable_tqdm=True) if remaining else [])
        self.answer_log.flush()
        self.truncated |= {
            (str(request.task_name), int(request.doc_id or 0))
            for request in requests
            if _truncation_key(method, request.args) in self.answer_log
        }
        return [logged[key] if key in logged else next(new) for key in keys]


def _repeat_key(key: str, number: int) -> str:
    return f"{key} {number}"


def _random_state() -> list[str]:
    """The state of torch's generators, from which the next batch is sampled."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def _set_random_state(states: list[str]) -> None:
    first, *others = (torch.tensor(list(base64.b64decode(state)), dtype=torch.uint8) for state in states)
    torch.set_rng_state(first)
    for device, state in enumerate(others):
        torch.cuda.set_rng_state(state, device)


def _truncation_key(method: str, arguments: Any) -> str:
    """The log's key for a truncated prompt: the prompt with its continuation, or the prompt alone if it generates."""
    return hash_args(f"cut {method}", arguments[:1] if method == "generate_until" else arguments)


class HFModel(ResumableModel, HFLM):
    """lm-eval's Hugging Face model. Several processes share the items on CPUs and across machines, too."""

    @property
    def rank(self) -> int:
        """Index of this process among all machines'; lm-eval's own is the index on one machine, and 0 on a CPU."""
        return PartialState().process_index

    @property
    def world_size(self) -> int:
        """Number of processes on all machines; lm-eval's own is 1 on a CPU."""
        return PartialState().num_processes

    def _model_call(self, *arguments: Any, **settings: Any) -> Any:
        self.answer_log.flush()
        return super()._model_call(*arguments, **settings)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **settings: Any) -> Any:
        """Log what lm-eval is about to truncate from the left: lm-eval itself only prints a warning."""
        for texts, context, continuation in requests:
            if texts and len(context) + len(continuation) > self.max_length + 1:
                self.answer_log.add(_truncation_key("loglikelihood", texts), value=True)
        return super()._loglikelihood_tokens(requests, *arguments, **settings)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> Any:
        """Encode prompts for generation; log those that lm-eval truncates."""
        encoded = super().tok_batch_encode(strings, padding_side, left_truncate_len, **settings)
        if left_truncate_len and encoded[0].shape[1] == left_truncate_len:
            for string in strings:
                if len(self.tok_encode(string)) > left_truncate_len:
                    self.answer_log.add(_truncation_key("generate_until", (string,)), value=True)
        return encoded


def load_model(path: Path, config: LMEvalStage, checkpoints: Path, on_answers: Callable[[int], None]) -> ResumableModel:
    """Load the checkpoint and tokenizer in `path`, from safetensors only, as a ResumableModel. Raises UserError."""
    options, name = config.options, config.models[0]
    arguments: dict[str, Any] = {
        "checkpoints": checkpoints,
        "on_answers": on_answers,
        "pretrained": str(path),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "trust_remote_code": config.trust_remote_code,
    }
    gpus = config.resources.gpus or 1
    try:
        if options.backend == "vllm":
            model = _load_vllm(arguments, gpus)
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            split = device == "cuda" and gpus > 1 and config.launch is None
            model = HFModel(**arguments, device=device, use_safetensors=True, parallelize=split)
    except (OSError, ValueError) as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise UserError(f"{name} comes with its own Python files; if you trust them, {TRUST}") from None
    remove_appended_eos(cast(Any, model.tokenizer))
    if isinstance(model, HFModel):
        model.removed_defaults = remove_generation_defaults(model.model)
    if options.apply_chat_template and not cast(Any, model.tokenizer).chat_template:
        raise UserError(f"options.apply_chat_template: the tokenizer of {name} has no chat template; set it to false")
    return model


def _load_vllm(arguments: dict[str, Any], gpus: int) -> ResumableModel:
    """lm-eval's vLLM model, split over the GPUs. vLLM chooses its own batches."""
    from lm_eval.models.vllm_causallms import VLLM

    arguments |= {"batch_size": "auto", "tensor_parallel_size": gpus, "load_format": "safetensors"}
    modify = staticmethod(lambda *args, **kwargs: _as_transformers(*VLLM.modify_gen_kwargs(*args, **kwargs)))
    return cast(ResumableModel, type("VLLMModel", (ResumableModel, VLLM), {"modify_gen_kwargs": modify})(**arguments))


def _as_transformers(settings: dict[str, Any], *others: Any) -> tuple[Any, ...]:
    """Add the default of transformers for sampling that vLLM does not share."""
    return ({"top_k": 50} if settings.get("temperature") else {}) | settings, *others
