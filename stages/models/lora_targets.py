"""Check the modules that LoRA options name against a model's safetensors headers, without torch.

Refuses only names that match no module at all, as PEFT does (peft.tuners.tuners_utils.check_target_module_exists).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stages.base import UserError

MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
OUTPUT = "lm_head"  # this module has no tensor in the file if its weights are tied to the embeddings


def check_targets(model: Path, lora: dict[str, Any]) -> None:
    """Check that the names in `lora` match modules. Does nothing if `model` is not a folder of safetensors.

    Raises UserError if no module matches lora.target_modules, or none matches lora.modules_to_save.
    """
    modules = module_names(model)
    if not modules:
        return
    targets, saved = lora.get("target_modules"), lora.get("modules_to_save")
    layers = sorted({name.rpartition(".")[2] for name in modules} - {""})
    has = f"it has {', '.join(name for name in layers if not name.isdecimal())}"
    if isinstance(targets, str) and targets.lower() != "all-linear" and not _matches(targets, modules):
        hint = f"; write [{targets}] for the modules of that name" if targets in layers else ""
        raise UserError(f"{targets!r} matches no module of the model{hint}; {has}", key="lora.target_modules")
    if isinstance(targets, list) and not any(f".{name}".endswith(f".{t}") for name in modules for t in targets):
        raise UserError(f"none of {targets} is a module of the model; {has}", key="lora.target_modules")
    containers = {name[: dot.start()] for name in modules for dot in re.finditer(r"\.|$", name)}
    if saved and not any(name.endswith(str(module)) for name in containers for module in saved):
        raise UserError(f"none of {saved} is a module of the model; {has}", key="lora.modules_to_save")


def module_names(model: Path) -> set[str]:
    """Return the full names of the modules with weights; empty if `model` is not a folder of safetensors."""
    try:
        names = {name for file in sorted(model.glob("*.safetensors")) for name in _names_in(file)}
    except (OSError, ValueError):  # loading the model reports a damaged file
        return set()
    return names | {OUTPUT} if names else names


def _names_in(file: Path) -> set[str]:
    """Read the header: 8 bytes with its length, then JSON that describes each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{file}: its header has {length} bytes")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: its header describes no tensors")
    return {name.rpartition(".")[0] for name in header if name != "__metadata__"}


def _matches(pattern: str, modules: set[str]) -> bool:
    """Whether the pattern matches a full name; transformers can put a prefix before the names in the file."""
    try:
        names = (prefix + name for name in modules for prefix in ("", "model.", "transformer."))
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}", key="lora.target_modules") from None
