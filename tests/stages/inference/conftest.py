"""Small models of several architectures, with weights that make their attention matter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "eos_token_id": 2}
SHARING = {
    "llama": transformers.LlamaConfig(**SIZES),
    "eager": transformers.LlamaConfig(**SIZES, attn_implementation="eager"),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=4096),
    "gpt2": transformers.GPT2Config(**GPT2),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
"""Architectures whose requests can share passes."""
PLAIN = {
    "a sliding window shorter than the text": transformers.MistralConfig(**SIZES, sliding_window=64),
    "a layer with a sliding window": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=64),
    "ALiBi": transformers.BloomConfig(vocab_size=512, hidden_size=64, n_layer=3, n_head=4),
    "no attention": transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3, state_size=8),
}
"""Architectures whose requests cannot."""


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Prompts with shared starts and without, one of them the start of another."""
    rng = random.Random(0)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(3, 512), k=rng.randint(least, most)))

    start = draw(120, 120)
    return [*(start + draw(5, 40) for _ in range(8)), start[:90], start[:3], *(draw(1, 250) for _ in range(4))]
