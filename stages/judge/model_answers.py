"""A model's answers to conversations, in batches that are kept as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.inference.language_model import LanguageModel, Tokens
from stages.judge.config import JudgeStage, Options

Conversation = list[dict[str, str]]
"""Messages up to the one that is to be answered."""


class _Generator(Protocol):
    """What answers prompts."""

    def generate(
        self, prompts: Sequence[Tokens], max_new_tokens: int, batch_size: int, temperature: float
    ) -> list[Tokens]: ...


class Answerer:
    """The model under test.

    Args:
        config: the recipe's section.
        path: a folder that from_pretrained loads.
        kept: answers, by a key of their place.

    Raises:
        UserError: it cannot be loaded, or has no chat template.
    """

    def __init__(self, config: JudgeStage, path: Path, kept: AnswerLog) -> None:
        self.config, self.options, self.kept = config, config.options, kept
        self.model = LanguageModel(path, config.models[0], config.options.dtype, config.trust_remote_code)
        self.generator: _Generator = self.model
        if config.options.backend == "vllm":
            self.generator = _VLLM(path, config)

    def answer(
        self, conversations: Sequence[Conversation], temperature: float, place: str, answered: Callable[[int], None]
    ) -> list[str]:
        """The answers; by batches, each drawn by its own seed, so that one made before an interruption changes no
        other. Raises UserError for a conversation that is too long."""
        options, found = self.options, []
        prompts = [self.model.encode(_given(conversation, options)) for conversation in conversations]
        for prompt in prompts:
            self.model.check_length(prompt, options.max_new_tokens, place)
        for start in range(0, len(prompts), options.batch_size):
            key = f"{place} {start}"
            if key not in self.kept:
                torch.manual_seed(_seed(self.config.seed, key))
                batch = prompts[start : start + options.batch_size]
                made = self.generator.generate(batch, options.max_new_tokens, options.batch_size, temperature)
                self.kept.add(key, [self.model.decode(tokens).strip() for tokens in made])
                self.kept.flush()
            found += self.kept[key]
            answered(len(self.kept[key]))
        return found


class _VLLM:
    """vLLM, over as many GPUs as the stage's resources name."""

    def __init__(self, path: Path, config: JudgeStage) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"options.backend: vllm cannot be loaded ({error}); pip install -e '.[vllm]'") from None
        self.seed = config.seed
        self.llm: Any = LLM(
            model=str(path),
            dtype=config.options.dtype,
            tensor_parallel_size=config.resources.gpus or 1,
            load_format="safetensors",
            trust_remote_code=config.trust_remote_code,
        )

    def generate(
        self, prompts: Sequence[Tokens], max_new_tokens: int, batch_size: int, temperature: float
    ) -> list[Tokens]:
        """As LanguageModel's; vLLM chooses its own batches."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=self.seed)
        made = self.llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling)
        return [list(each.outputs[0].token_ids) for each in made]


def _given(conversation: Conversation, options: Options) -> Conversation | str:
    system = [{"role": "system", "content": options.system_instruction}] if options.system_instruction else []
    if options.apply_chat_template:
        return [*system, *conversation]
    return "\n\n".join(message["content"] for message in [*system, *conversation]) + "\n\n"


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big")
