"""vLLM in place of transformers: it shares prefixes and fills its batches itself."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.inference.engine import Engine
from stages.inference.prefix_tree import Tokens
from stages.inference.requests import GenerationRequest, Score, ScoreRequest

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes by default."""
REQUESTS = 1024
"""Requests handed over at a time; a resumed step asks again for the last of them."""


class VLLMEngine(Engine):
    """Engine's model is without weights here; vLLM has them, split over `gpus`."""

    def _load(self, path: Path, dtype: str, trust_remote_code: bool, gpus: float) -> Any:
        from vllm import LLM

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
            return AutoModelForCausalLM.from_config(config, dtype=self.llm.llm_engine.model_config.dtype)

    def is_plain(self, name: str, longest: Tokens) -> bool:
        return False

    def _score(
        self,
        requests: Sequence[ScoreRequest],
        done: Sequence[bool],
        softmax_dtype: torch.dtype | None,
        add: Callable[[dict[int, Score]], None],
    ) -> None:
        from vllm import SamplingParams, TokensPrompt

        numbers = [number for number in range(len(requests)) if not done[number]]
        for start in range(0, len(numbers), REQUESTS):
            part = numbers[start : start + REQUESTS]
            prompts = [TokensPrompt(prompt_token_ids=list(requests[number].tokens)) for number in part]
            outputs = self.llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
            scores = {}
            for number, output in zip(part, outputs, strict=True):
                answer = requests[number].answer
                entries = output.prompt_logprobs[-len(answer) :]
                entries = [entry[token] for entry, token in zip(entries, answer, strict=True)]
                scores[number] = Score(sum(e.logprob for e in entries), all(e.rank == 1 for e in entries))
            add(scores)

    def _batches(self, requests: dict[str, GenerationRequest], budget: int) -> Iterator[list[str]]:
        keys = sorted(requests)
        yield from (keys[start : start + REQUESTS] for start in range(0, len(keys), REQUESTS))

    def _answer(self, requests: list[GenerationRequest]) -> list[list[int]]:
        from vllm import SamplingParams, TokensPrompt

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
