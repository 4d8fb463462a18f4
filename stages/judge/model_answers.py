"""Generates a model's answers to conversations, in batches that are saved at once."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.evaluation.answer_log import AnswerLog
from stages.inference.language_model import LanguageModel, Tokens
from stages.judge.config import JudgeStage, Options

Conversation = list[dict[str, str]]
"""Messages up to the one that the model answers."""


class AnswerGenerator:
    """The evaluated model, loaded from the folder `path`. Raises UserError if it cannot be loaded."""

    def __init__(
        self, config: JudgeStage, path: Path, answer_log: AnswerLog, on_answers: Callable[[int], None]
    ) -> None:
        self.config, self.options = config, config.options
        self.answer_log, self.on_answers = answer_log, on_answers
        self.model = LanguageModel(path, config.models[0], config.options.dtype, config.trust_remote_code)
        self.backend = _VLLM(path, config) if config.options.backend == "vllm" else self.model

    def generate(self, conversations: Sequence[Conversation], temperature: float, name: str) -> list[str]:
        """Answer the conversations, logged as `name`. Each batch has its own seed, so that resuming does not change the
        next ones. Raises UserError if a conversation is too long or the tokenizer has no chat template."""
        options, answers = self.options, []
        prompts = [self.model.encode(_prompt(conversation, options)) for conversation in conversations]
        for prompt in prompts:
            self.model.check_length(prompt, options.max_new_tokens, name)
        for start in range(0, len(prompts), options.batch_size):
            key = f"{name} {start}"
            if key not in self.answer_log:
                digest = hashlib.sha256(f"{self.config.seed} {key}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:4], "big"))
                batch = prompts[start : start + options.batch_size]
                outputs = self.backend.generate(batch, options.max_new_tokens, options.batch_size, temperature)
                self.answer_log.add(key, [self.model.decode(tokens).strip() for tokens in outputs])
                self.answer_log.flush()
            answers += self.answer_log[key]
            self.on_answers(len(self.answer_log[key]))
        return answers


class _VLLM:
    def __init__(self, path: Path, config: JudgeStage) -> None:
        from vllm import LLM

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
        """Same as LanguageModel.generate, but vLLM chooses its own batches."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=self.seed)
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _prompt(conversation: Conversation, options: Options) -> Conversation | str:
    system = [{"role": "system", "content": options.system_instruction}] if options.system_instruction else []
    if options.apply_chat_template:
        return [*system, *conversation]
    return "\n\n".join(message["content"] for message in [*system, *conversation]) + "\n\n"
