"""Adds the stage kind `nothing` to every Python process of benchmarks.scale, which puts this folder on the path."""

import os
import sys

if os.environ.get("BENCHMARK_NOTHING") == "1":
    sys.path.insert(0, os.environ["BENCHMARK_ROOT"])
    from nothing.config import NothingStage

    from stages.kinds import KINDS

    KINDS["nothing"] = NothingStage
