"""How much memory the process of a step has taken."""

from __future__ import annotations

import resource
import sys
from typing import Any

BYTES = 1 if sys.platform == "darwin" else 1024
"""What the system counts resident memory in: see getrusage(2)."""


def peak_memory() -> str:
    """`memory 0.71 GiB`: the most that this process was resident with so far. `GPU memory 12.31 GiB` where it works on
    GPUs: the most that torch reserved on them."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        taken = sum(torch.cuda.max_memory_reserved(gpu) for gpu in range(torch.cuda.device_count()))
        return f"GPU memory {taken / 2**30:.2f} GiB"
    return f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES / 2**30:.2f} GiB"
