"""Bytes that a stage's process holds before it loads a model: `python -m stages.estimate.library_memory MODULE`."""

from __future__ import annotations

import importlib
import resource
import sys

from stages.system.memory import BYTES


def main(module: str) -> None:
    """Import what the stage imports, pass a little through a tiny model, so that what the first model brings along and
    threads are there, and print the most that was held."""
    importlib.import_module(module)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config)
    model(input_ids=torch.zeros(2, 64, dtype=torch.long)).logits.sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES)


if __name__ == "__main__":
    main(sys.argv[1])
