"""Convert a .gguf file to a transformers model folder, cached by the file's content.

The weights become plain float32 tensors, which compute the same and which training and merging need.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.base import UserError
from stages.system.integrity import build_once, content_hash, file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERSION_VERSION = 1  # part of the cache key; increase it when the same file would give another folder

PAD_TOKENS = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<unk>")
"""Special tokens that can serve as padding, in order of preference; none of them ends a turn."""


def to_safetensors(path: Path, cache: Path) -> Path:
    """Return a folder with the file's model: model.safetensors (float32), configs, tokenizer and chat template.

    The folder is in `cache/gguf/` under the hash of the file and VERSION. If several processes ask, one converts.
    Raises UserError if transformers cannot read the file.
    """
    folder = cache / "gguf" / content_hash([file_hash(path), CONVERSION_VERSION])
    build_once(folder, partial(_convert, path))
    return folder


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
            "use a model saved as safetensors"
        ) from error
    plain = _unquantised(model)
    _set_padding(tokenizer, plain)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unquantised(model: "PreTrainedModel") -> "PreTrainedModel":
    """Copy the weights to a new model whose config does not say quantised; transformers refuses to save the other."""
    config = model.config
    vars(config).pop("quantization_config", None)
    config._name_or_path = ""  # transformers puts the file's title here, which is no path
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _set_padding(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Set a padding token that ends no turn, if there is one: code that masks padding by id would mask the ends too."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        ends = {tokenizer.eos_token, tokenizer.bos_token}
        token = next((name for name in PAD_TOKENS if name in vocabulary and name not in ends), None)
        tokenizer.pad_token = token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
