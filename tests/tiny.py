"""A tiny tokenizer and model, which tests train in seconds, and how to train them without the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.base import Context, Input, StageConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, <pad> and <end>, so that boundaries can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return a Llama with two layers and the 258 tokens of the byte tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=byte_tokenizer().eos_token_id,
        pad_token_id=byte_tokenizer().pad_token_id,
    )
    return LlamaForCausalLM(config).to(dtype)


def run_training(
    folder: Path,
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    config: StageConfig,
    splits: Sequence[str] = ("train",),
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Path:
    """Run a stage on `rows` as each of `splits`, and return the folder that it publishes."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.load("run")(
        Context(
            recipe="r",
            step="s",
            config=config,
            inputs={"model": Input(model), **{split: Input(data) for split in splits}},
            out=folder / "out",
            scratch=folder / "scratch",
            checkpoints=folder / "checkpoints",
            cache=folder / "cache",
            progress=progress,
        )
    )
    return folder / "out"
