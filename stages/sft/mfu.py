"""Model FLOPs utilisation (MFU): the floating-point operations that a training needs, over those its device could do.

A token needs 4 N + 2 T: 2 N forward, 2 N for the gradients of activations, 2 T for those of the T trainable weights;
6 N if all train (Kaplan et al., 2020, arXiv 2001.08361). N has the head, but no table that is only looked up. A query
and a key that it attends to need 12 L H Q, for L layers of H heads of Q values (Chowdhery et al., 2022, arXiv
2204.02311, appendix B). Pairs are counted as they occur: under the causal mask, within an example. Neither padding
counts nor what activation checkpointing computes twice.
"""

from typing import Any

import torch
from trl.trainer.utils import get_peak_flops

from stages.models.model_size import model_size

_CONSUMER = {"RTX 4090": 165.2e12, "RTX 3090": 71e12}
"""Dense bfloat16 with float32 sums, by NVIDIA's Ada white paper, appendix A. TRL's table has data centre GPUs."""


def model_flops(model: Any) -> tuple[float, float] | None:
    """Return the FLOPs for a token and for a pair; None for a mixture of experts, and for packed, quantised weights."""
    config = model.config.get_text_config()
    if getattr(config, "num_experts_per_tok", None) or getattr(model, "quantization_method", None):
        return None
    size, heads = model_size(model), getattr(config, "num_attention_heads", 0)
    width = heads and (getattr(config, "head_dim", None) or config.hidden_size // heads)
    trainable = min(size.trainable, size.multiplied)
    return 4 * size.multiplied + 2 * trainable, 12 * config.num_hidden_layers * heads * width


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOPs per second of a GPU; None for one that no table has, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return get_peak_flops(name, "bfloat16") or next((peak for key, peak in _CONSUMER.items() if key in name), None)
