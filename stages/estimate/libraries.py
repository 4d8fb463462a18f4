"""Bytes that a stage's process holds before it loads a model: `python -m stages.estimate.libraries MODULE`."""

from __future__ import annotations

import importlib
import resource
import sys

from stages.memory import BYTES


def main(module: str) -> None:
    """Import what the stage imports, compute a little, so that threads are there, and print the most that was held."""
    importlib.import_module(module)
    import torch

    weight = torch.ones(512, 512, requires_grad=True)
    (weight @ weight).sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES)


if __name__ == "__main__":
    main(sys.argv[1])
