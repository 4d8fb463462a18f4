"""vLLM in place of transformers: it shares prefixes and fills its batches itself."""

import math
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from stages.evaluation.answer_log import AnswerLog
from stages.inference.engine import Add, Engine
from stages.inference.prefix_tree import Tokens
from stages.inference.requests import GenerationRequest, Score, ScoreRequest

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes by default."""
REQUESTS = 1024
"""Requests handed over at a time; a resumed step asks again for the last of them."""


class VLLMEngine(Engine):
    """Engine's model is without weights here; vLLM has them, split over `gpus` or on a share of one."""

    def __init__(
        self,
        path: Path,
        dtype: str,
        trust_remote_code: bool,
        gpus: float,
        tokenizer: Any,
        name: str,
        budget: int | None,
        log: AnswerLog | None,
    ) -> None:
        self.llm: Any = LLM(
            model=str(path),
            dtype=dtype,
            tensor_parallel_size=math.ceil(gpus),
            gpu_memory_utilization=MEMORY_SHARE * min(1, gpus),
            load_format="safetensors",
            trust_remote_code=trust_remote_code,
        )
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, dtype=self.llm.llm_engine.model_config.dtype)
        super().__init__(tokenizer, model, name, budget, log)

    def is_plain(self, name: str, longest: Tokens) -> bool:
        return False

    def _score(
        self, requests: dict[str, ScoreRequest], answers: Container[str], add: Add, softmax_dtype: torch.dtype | None
    ) -> None:
        keys = [key for key in requests if key not in answers]
        for start in range(0, len(keys), REQUESTS):
            part = keys[start : start + REQUESTS]
            prompts = [TokensPrompt(prompt_token_ids=list(requests[key].tokens)) for key in part]
            outputs = self.llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
            scores = {}
            for key, output in zip(part, outputs, strict=True):
                answer = requests[key].answer
                entries = output.prompt_logprobs[-len(answer) :]
                entries = [entry[token] for entry, token in zip(entries, answer, strict=True)]
                scores[key] = Score(sum(e.logprob for e in entries), all(e.rank == 1 for e in entries))
            add(scores)

    def _batches(self, requests: dict[str, GenerationRequest], budget: int) -> Iterator[list[str]]:
        keys = sorted(requests)
        yield from (keys[start : start + REQUESTS] for start in range(0, len(keys), REQUESTS))

    def _answer(self, requests: list[GenerationRequest]) -> list[list[int]]:
        sampling = [
            SamplingParams(
                max_tokens=request.limit,
                temperature=request.temperature,
                seed=request.seed,
                stop=list(request.stops) or None,
                stop_token_ids=sorted(self.eos_ids),
                include_stop_str_in_output=True,
            )
            for request in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt)) for request in requests]
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(prompts, sampling)]
