"""What a model's folder must be before anything is loaded from it: safetensors, and no code but where it is trusted.

Light by intent: opens JSON files only, and imports transformers just where a folder says that it has its own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.base import UserError

TRUST = "set trust_remote_code: true on the stage, which lets them do on this machine whatever you can do"
REMOTE_CODE = "trust_remote_code: the model's own Python files run"
"""What --plan says of a stage that sets it."""

_AUTO = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
"""The classes by which models are loaded here; what a folder maps others to is never run."""


def check_model(path: Path, trusted: bool, key: str, weights: bool = True) -> None:
    """Raise UserError, at `key`, where the model in `path` cannot be loaded safely.

    Args:
        path: a folder that save_pretrained wrote, or a .gguf file, which holds neither pickles nor code.
        trusted: the stage's trust_remote_code.
        weights: whether weights are read from it.
    """
    if path.is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter; merge it into its model (merge_and_unload) and save that", key)
    if weights:
        _check_weights(path, key)
    for file in ("config.json", "tokenizer_config.json"):
        _check_code(path, _read(path / file, key), trusted, key)


def why_not_loaded(error: Exception) -> str:
    """What a library's error says, in a line."""
    if "trust_remote_code=True" in str(error):
        return f"it comes with its own Python files; if you trust them, {TRUST}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_context(path: Path, length: int | None, key: str) -> None:
    """Raise UserError, at `key`, where `length` tokens are more than the model in `path` was made for."""
    config = _read(path / "config.json", key) if path.is_dir() else {}
    inner = config.get("text_config")
    longest = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    if length is not None and isinstance(longest, int) and length > longest:
        raise UserError(f"{length} tokens are more than the {longest} that {path} takes", key)


def _check_weights(path: Path, key: str) -> None:
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
        found = f"only {', '.join(pickles)}, and pickles run code when they are read" if pickles else "none"
        raise UserError(f"{path}: weights are read from *.safetensors, and it has {found}; save it as safetensors", key)
    index = path / "model.safetensors.index.json"
    for shard in (_read(index, key).get("weight_map") or {}).values():
        if shard not in names:
            raise UserError(f"{index}: names {shard!r}, which is no *.safetensors beside it; save the model anew", key)


def _check_code(path: Path, config: dict[str, Any], trusted: bool, key: str) -> None:
    """Whether the code that `config` asks for is trusted, there, and in the folder itself."""
    auto_map = config.get("auto_map") or {}
    values = [auto_map.get(name) for name in _AUTO] if isinstance(auto_map, dict) else [auto_map]
    classes = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    if not trusted:
        if classes and not _known(config):
            told = f"{path} is loaded by its own Python files ({', '.join(classes)})"
            raise UserError(f"{told}; if you trust them, {TRUST}", key)
        return
    for name in map(str, classes):
        file = path / f"{name.partition('.')[0]}.py"
        if "--" in name or not file.is_file():
            raise UserError(f"{path}: its code, {name}, is not in its own folder; add it, or name another model", key)


def _known(config: dict[str, Any]) -> bool:
    """Whether transformers loads it by its own code. What a tokenizer needs is seen when it is loaded."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    return "tokenizer_class" in config or config.get("model_type") in CONFIG_MAPPING_NAMES


def _read(file: Path, key: str) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}", key) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object", key)
    return value
