"""How fast this machine computes a model of such a width: a brief forward and backward pass of a few of its layers."""

from __future__ import annotations

import time
from typing import Any

import torch

from stages.estimate.sizes import build
from stages.estimate.trace import with_layers

FLOPS = {"cpu": 6e9, "cuda": 5e12}
"""About how much is computed in one pass."""
NO_ROOM = "time: a few layers of the model take too much memory here to measure how fast they are"
VOCABULARY = 8_192
"""Tokens that the measured slice knows at most."""


def measured(
    config: Any, device: str, threads: int, length: int, trains: bool, bfloat16: bool, room: int
) -> float | None:
    """FLOPs per second, 6 (or 2 without `trains`) of them for each parameter and token, by the second of two passes.
    None where so few layers take more than half of `room`, in bytes."""
    sliced = with_layers(config, min(2, config.get_text_config().num_hidden_layers))
    text = sliced.get_text_config()
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    with torch.device("meta"):
        held = sum(p.nbytes for p in build(sliced, torch.float32).parameters()) * (2 if trains else 1)
    if held > room / 2:
        return None
    torch.set_num_threads(threads)
    with torch.device(device):
        model = build(sliced, torch.float32)
        per_token = (6 if trains else 2) * sum(p.numel() for p in model.parameters())
        length = max(16, min(length, round(FLOPS[device] / per_token)))
        rows = max(1, min(64, round(FLOPS[device] / per_token / length)))
        ids = torch.zeros(rows, length, dtype=torch.long)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.set_grad_enabled(trains), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
        if trains:
            loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return per_token * ids.numel() / seconds
