"""A .gguf file -> a model folder as transformers writes one, made once and kept by content.

The weights become plain float32 tensors, which training and merging need and which compute what the file did.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from stages.base import UserError
from stages.system.integrity import broken_seal, content_hash, file_hash, seal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
"""Raised when the same file would become another folder."""

PAD_TOKENS = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<unk>")
"""Special tokens that may fill up a row, in this order: none of them ends a turn."""


def to_safetensors(path: Path, cache: Path) -> Path:
    """The folder with the file's model: model.safetensors (float32), configs, tokenizer and chat template.

    Lies in `cache/gguf/` under the hash of the file and this converter's version; two processes convert once.

    Raises:
        UserError: if transformers cannot read the file.
    """
    key = content_hash([file_hash(path), VERSION])
    store = cache / "gguf"
    store.mkdir(parents=True, exist_ok=True)
    target, work = store / key, store / f".{key}"
    with FileLock(f"{work}.lock"):
        if broken_seal(target) is None:
            return target
        for left in (work, target):  # what a killed run left, or what was damaged since
            shutil.rmtree(left, ignore_errors=True)
        try:
            _convert(path, work)
            seal(work)
            work.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(
            f"{path}: transformers cannot read this .gguf file ({type(error).__name__}: {error}); "
            "name a model as safetensors instead"
        ) from error
    plain = _plain(model)
    _set_padding(tokenizer, plain)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model that does not think itself quantised, which could not be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""  # the file's own title, which is no path
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """A padding token other than the one that ends a turn, where the vocabulary has one.

    Where both are one token, code that masks padding by its id also masks the ends that should be learnt.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        ends = {tokenizer.eos_token, tokenizer.bos_token}
        token = next((name for name in PAD_TOKENS if name in vocabulary and name not in ends), None)
        tokenizer.pad_token = token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
