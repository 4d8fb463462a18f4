"""The modules of a model as the headers of its safetensors name them, so that LoRA's targets are checked without torch.

Only what no run could do is refused: names that match nothing (peft.tuners.tuners_utils.check_target_module_exists).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stages.base import UserError

MAX_HEADER = 100_000_000
"""Bytes; what safetensors itself admits."""
OUTPUT = "lm_head"
"""Where it is tied to the embeddings, it is a module without a tensor of its own."""


def check_targets(model: Path, lora: dict[str, Any]) -> None:
    """Look whether what `lora` names is there. Says nothing of a model that is no folder of safetensors.

    Raises:
        UserError: no module of `model` is one of lora.target_modules, or of lora.modules_to_save.
    """
    modules = modules_of(model)
    if not modules:
        return
    targets, saved = lora.get("target_modules"), lora.get("modules_to_save")
    layers = sorted({name.rpartition(".")[2] for name in modules} - {""})
    has = f"it has {', '.join(name for name in layers if not name.isdecimal())}"
    if isinstance(targets, str) and targets.lower() != "all-linear" and not _matches(targets, modules):
        hint = f"; write [{targets}] for the modules of that name" if targets in layers else ""
        raise UserError(f"no module's whole name matches {targets!r}{hint}; {has}", key="lora.target_modules")
    if isinstance(targets, list) and not any(f".{name}".endswith(f".{t}") for name in modules for t in targets):
        raise UserError(f"none of {targets} is a module of the model; {has}", key="lora.target_modules")
    whole = {name[: found.start()] for name in modules for found in re.finditer(r"\.|$", name)}
    if saved and not any(name.endswith(str(one)) for name in whole for one in saved):
        raise UserError(f"none of {saved} is a module of the model; {has}", key="lora.modules_to_save")


def modules_of(model: Path) -> set[str]:
    """The full names of the modules that hold weights; none where `model` is no folder of safetensors."""
    try:
        found = {name for file in sorted(model.glob("*.safetensors")) for name in _in_file(file)}
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return set()
    return found | {OUTPUT} if found else found


def _in_file(file: Path) -> set[str]:
    """The modules in the header of `file`: 8 bytes that say its length, then JSON that describes each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{file}: a header of {length} bytes")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: a header that describes no tensors")
    return {name.rpartition(".")[0] for name in header if name != "__metadata__"}


def _matches(pattern: str, modules: set[str]) -> bool:
    """Whether `pattern` is the whole name of a module, or of one under the names that transformers may put before."""
    try:
        names = (prefix + name for name in modules for prefix in ("", "model.", "transformer."))
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}", key="lora.target_modules") from None
