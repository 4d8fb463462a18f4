"""What a stage asks of an engine: to score an answer, or to generate one."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from stages.inference.prefix_tree import Tokens


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for log p(answer | prompt). Neither is empty."""

    prompt: Tokens
    answer: Tokens

    @property
    def tokens(self) -> Tokens:
        return self.prompt + self.answer


class Score(NamedTuple):
    """The answer to a ScoreRequest."""

    log_prob: float
    """Sum over the tokens of the answer, in natural logarithms."""
    is_greedy: bool
    """Whether each token of the answer is the most probable one."""


@dataclass(frozen=True)
class GenerationRequest:
    """Asks for 1 to `limit` tokens after a prompt, which is not empty. The first that ends an answer is the last."""

    prompt: Tokens
    limit: int
    stops: tuple[str, ...] = ()
    """Texts at which the answer may end; it can reach a few tokens beyond."""
    temperature: float = 0.0
    """0: each token is the most probable one."""
    seed: int = 0
    """Of the sampled tokens, which depend on no other request."""


def key_of(request: ScoreRequest | GenerationRequest) -> str:
    """Return a key of everything that decides the answer of a model to a request."""
    return hashlib.sha256(repr(request).encode()).hexdigest()[:32]
