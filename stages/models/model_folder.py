"""Check a model folder before loading it: weights are safetensors, and its Python files run only if trusted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.base import UserError
from stages.system.terminal_text import first_line

TRUST = "set trust_remote_code: true on the stage; they can then do on this machine whatever you can do"
REMOTE_CODE = "trust_remote_code: the model's own Python files run"  # the line of --plan for a stage that sets it
_AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")  # code that a folder has for others never runs


def check_model(path: Path, trusted: bool, key: str, weights: bool = True) -> None:
    """Raise UserError, at `key` of the stage's section, if a model cannot be loaded safely.

    Args:
        path: a folder in the format of save_pretrained, or a .gguf file.
        trusted: the stage's trust_remote_code.
        weights: whether the stage reads the weights.
    """
    if path.is_file():  # a .gguf file has neither pickles nor code
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter; merge it into its model (merge_and_unload) and save that", key)
    if weights:
        _check_weights(path, key)
    for file in ("config.json", "tokenizer_config.json"):
        _check_code(path, _read_json(path / file, key), trusted, key)


def why_not_loaded(error: BaseException) -> str:
    """Return the first line of a library's error."""
    if "trust_remote_code=True" in str(error):
        return f"it comes with its own Python files; if you trust them, {TRUST}"
    return first_line(error)


def check_context(path: Path, length: int | None, key: str) -> None:
    """Raise UserError, at `key`, if the context of the model in `path` is shorter than `length` tokens."""
    config = _read_json(path / "config.json", key) if path.is_dir() else {}
    text_config = config.get("text_config")
    values = text_config if isinstance(text_config, dict) else config
    longest = next((values[name] for name in ("max_position_embeddings", "n_positions") if name in values), None)
    if length is not None and isinstance(longest, int) and length > longest:
        raise UserError(f"{length} tokens are more than the {longest} that {path} supports", key)


def _check_weights(path: Path, key: str) -> None:
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
        only = f", only {', '.join(pickles)}, and pickles run code when they are read" if pickles else ""
        raise UserError(f"{path}: has no *.safetensors weights{only}; save the model as safetensors", key)
    index = path / "model.safetensors.index.json"
    weight_map = _read_json(index, key).get("weight_map") or {}
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: its weight_map is no JSON object; save the model again", key)
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard not in names:
            raise UserError(f"{index}: names {shard!r}, not a *.safetensors in its folder; save the model again", key)


def _check_code(path: Path, config: dict[str, Any], trusted: bool, key: str) -> None:
    """Check that the code that `config` names is trusted and lies in the folder."""
    if not trusted and (kernels := sorted(set(_kernels_of_the_hub(config)))):
        text = f"its config runs attention by {', '.join(kernels)} of the hub, which is code"
        raise UserError(f"{path}: {text}; remove attn_implementation there, or if you trust it, {TRUST}", key)
    auto_map = config.get("auto_map") or {}
    values = [auto_map.get(name) for name in _AUTO_CLASSES] if isinstance(auto_map, dict) else [auto_map]
    classes = [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]
    if not trusted:
        if classes and not _is_built_in(config):
            raise UserError(
                f"{path} is loaded by its own Python files ({', '.join(classes)}); if you trust them, {TRUST}", key
            )
        return
    for name in classes:
        file = path / f"{name.partition('.')[0]}.py"
        if "--" in name or not file.is_file():
            raise UserError(f"{path}: its code, {name}, is not in its own folder; add it, or name another model", key)


def _kernels_of_the_hub(value: Any) -> Iterator[str]:
    """Yield what a config, or one inside it, names as its attention, where it is no name that transformers knows."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name.strip("_").startswith("attn_implementation"):
            names = inner.values() if isinstance(inner, dict) else [inner]  # one for each part of a model
            yield from (each for each in map(str, names) if "/" in each)
        elif isinstance(inner, dict):
            yield from _kernels_of_the_hub(inner)


def _is_built_in(config: dict[str, Any]) -> bool:
    """Whether transformers has the code itself. For a tokenizer, that shows only when it is loaded."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    return "tokenizer_class" in config or str(config.get("model_type")) in CONFIG_MAPPING_NAMES


def _read_json(file: Path, key: str) -> dict[str, Any]:
    """Read a JSON object; empty if there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}", key) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object", key)
    return value
