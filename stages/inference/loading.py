"""Load the engine of a stage that scores models."""

from pathlib import Path
from typing import Any

import torch

from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.config import EvaluationStage
from stages.inference.engine import Engine


def load_engine(config: EvaluationStage, path: Path, log: AnswerLog | None = None) -> Engine:
    """Load the stage's model, in `path`, with its options. Raises UserError."""
    options: Any = config.options  # type: ignore[attr-defined]
    backend = Engine
    if getattr(options, "backend", "hf") == "vllm":
        from stages.inference.vllm import VLLMEngine as backend  # is not installed everywhere
    gpus = (config.resources.gpus or 1) if config.processes == 1 and torch.cuda.is_available() else 1
    trusted = config.trust_remote_code
    return backend(path, config.models[0], options.dtype, trusted, options.batch_size, log, gpus)
