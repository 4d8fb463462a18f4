"""The model under test: lm-eval's own Hugging Face model, with a count of what it has answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from stages.base import BadInput
from stages.lm_eval.config import Options
from stages.model_files import TRUST


class CountingHook(CacheHook):
    """lm-eval calls its answer cache's hook once per answered request. No cache here: this one counts."""

    def __init__(self, answered: Callable[[], None]) -> None:
        super().__init__(None)
        self.answered = answered

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One request was answered."""
        self.answered()


class Model(HFLM):
    """HFLM without its progress bars: the console shows the hook's count instead."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of continuations."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Scores of whole texts."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generated answers."""
        return super().generate_until(requests, disable_tqdm=True)


def load_model(path: Path, options: Options, name: str, trust_remote_code: bool = False) -> Model:
    """The checkpoint and tokenizer in `path`: safetensors only, and the folder's own code only where it is trusted.

    Raises BadInput.
    """
    try:
        model = Model(
            pretrained=str(path),
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=options.dtype,
            batch_size=options.batch_size,
            max_length=options.max_length,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise BadInput(f"{name} comes with its own Python files; if you trust them, {TRUST}") from None
    if options.apply_chat_template and not model.tokenizer.chat_template:
        raise BadInput(
            f"options.apply_chat_template: the tokenizer of {name} has no chat template; "
            "evaluate it without, or give the model one"
        )
    return model
