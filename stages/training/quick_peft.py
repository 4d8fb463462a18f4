"""Imports peft, for whom trains, without bitsandbytes.

Where bitsandbytes is installed, peft imports it for a helper that nothing here calls, and it prepares torch's compiler:
a third of what a worker takes to start. What quantises a model imports it by itself, as ever. To be imported before
trl and transformers' trainer, which import peft too.
"""

from __future__ import annotations

import sys

if "bitsandbytes" not in sys.modules:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # an ImportError, which peft.helpers expects
    try:
        import peft  # noqa: F401
    finally:
        del sys.modules["bitsandbytes"]
