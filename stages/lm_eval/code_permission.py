"""Which code of others may run in an evaluation, apart from the model's own: what models write, and hub metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from stages.base import UserError
from stages.lm_eval.config import LMEvalStage


@contextmanager
def only_trusted_code(config: LMEvalStage) -> Iterator[None]:
    """Within, evaluate runs what models wrote only where that is confirmed, and loads no metric, which is a Python
    script off the hub, unless that or remote code is trusted. Raises UserError for those."""
    unsafe = config.options.confirm_run_unsafe_code
    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise UserError(_told(path))

    with patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1" if unsafe else "0"}):
        if unsafe or config.trust_remote_code:
            yield
            return
        with patch("evaluate.load", refuse):
            try:
                yield
            except Exception:
                if not refused:
                    raise
        if refused:  # lm-eval goes on without the metric, and fails elsewhere
            raise UserError(_told(refused[0])) from None


def _told(metric: str) -> str:
    return (
        f"tasks: {metric!r} is a metric that evaluate loads from the hub, as Python code; if you trust it, set"
        " trust_remote_code: true on the stage"
    )
