"""Generates a model's answers to conversations."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.evaluation.answer_log import AnswerLog
from stages.inference.loading import load_engine
from stages.inference.requests import GenerationRequest
from stages.judge.config import JudgeStage, Options

Conversation = list[dict[str, str]]
"""Messages up to the one that the model answers."""


class AnswerGenerator:
    """The evaluated model, loaded from the folder `path`. Raises UserError if it cannot be loaded."""

    def __init__(
        self, config: JudgeStage, path: Path, answer_log: AnswerLog, on_answers: Callable[[int], None]
    ) -> None:
        self.config, self.options, self.on_answers = config, config.options, on_answers
        self.model = load_engine(config, path, answer_log)

    def generate(self, conversations: Sequence[Conversation], temperature: float, name: str) -> list[str]:
        """Answer the conversations; samples of each have a seed of their own, of `name` and its number.

        Raises UserError if a conversation is too long or the tokenizer has no chat template.
        """
        limit, requests = self.options.max_new_tokens, []
        for number, conversation in enumerate(conversations):
            prompt = self.model.encode(_prompt(conversation, self.options))
            self.model.check_length(prompt, limit, name)
            seed = zlib.crc32(f"{self.config.seed} {name} {number}".encode()) if temperature else 0
            requests.append(GenerationRequest(prompt, limit, temperature=temperature, seed=seed))
        return [self.model.decode(answer).strip() for answer in self.model.generate(requests, self.on_answers)]


def _prompt(conversation: Conversation, options: Options) -> Conversation | str:
    system = [{"role": "system", "content": options.system_instruction}] if options.system_instruction else []
    if options.apply_chat_template:
        return [*system, *conversation]
    return "\n\n".join(message["content"] for message in [*system, *conversation]) + "\n\n"
