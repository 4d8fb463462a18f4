"""Adds the kind `nothing` to every Python that starts with this folder on its path, as benchmarks.scale does."""

import os
import sys

if os.environ.get("BENCHMARK_NOTHING") == "1":
    sys.path.insert(0, os.environ["BENCHMARK_ROOT"])
    from nothing.config import NothingStage

    from stages import KINDS

    KINDS["nothing"] = NothingStage
