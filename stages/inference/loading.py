"""Load the engine of a stage that scores models."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.base import UserError
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.config import EvaluationStage, ModelOptions
from stages.inference.engine import Engine
from stages.models.model_folder import why_not_loaded


def load_engine(config: EvaluationStage, path: Path, log: AnswerLog | None = None) -> Engine:
    """Load the stage's model, from the safetensors in `path`, with its options. Raises UserError."""
    options, name, trusted = getattr(config, "options", ModelOptions()), config.models[0], config.trust_remote_code
    gpus = (config.resources.gpus or 1) if config.processes == 1 and torch.cuda.is_available() else 1
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
        if getattr(options, "backend", "hf") == "vllm":
            from stages.inference.vllm import VLLMEngine  # is not installed everywhere

            return VLLMEngine(path, options.dtype, trusted, gpus, tokenizer, name, options.batch_size, log)
        placement: dict[str, Any] = {"device_map": "auto"} if gpus > 1 else {}
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=options.dtype, trust_remote_code=trusted, **placement
        )
        model = model if placement else model.to(PartialState().device)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {why_not_loaded(error)}") from None
    return Engine(tokenizer, model, name, options.batch_size, log)
