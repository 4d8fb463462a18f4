"""Peak memory of the current process."""

import resource
import sys
from typing import Any

BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss; see getrusage(2)


def peak_memory() -> str:
    """Format the peak resident memory, `memory 0.71 GiB`, or what torch reserved on GPUs, `GPU memory 12.31 GiB`."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        reserved = sum(torch.cuda.max_memory_reserved(gpu) for gpu in range(torch.cuda.device_count()))
        return f"GPU memory {reserved / 2**30:.2f} GiB"
    return f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES / 2**30:.2f} GiB"
