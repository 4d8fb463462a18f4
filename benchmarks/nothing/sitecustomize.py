"""A kind of stage that does nothing, for benchmarks.scale: known to every Python that starts with this folder on its
path, which is how the command and its workers learn of it."""

import os
import sys
from typing import Any, ClassVar, Literal

if os.environ.get("BENCHMARK_NOTHING") == "1":
    sys.path.insert(0, os.environ["BENCHMARK_ROOT"])
    from stages import KINDS
    from stages.base import Need, StageConfig

    class NothingStage(StageConfig):
        """Publishes one empty file."""

        kind: ClassVar[str] = "nothing"
        makes: ClassVar[Literal["model"]] = "model"
        version: ClassVar[int] = 1
        runner: ClassVar[str] = "sitecustomize:run"

        value: float

        def needs(self) -> dict[str, Need]:
            """Nothing."""
            return {}

    KINDS["nothing"] = NothingStage


def run(context: Any) -> dict[str, Any]:
    """Do nothing."""
    (context.out / "nothing").touch()
    return {}
