"""Load the tokenizer of a model folder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.base import UserError
from stages.models.model_folder import why_not_loaded


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `path`. Raises UserError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any type; a broken file makes the library tokenizers panic
        raise UserError(f"{path}: holds no tokenizer that can be loaded: {why_not_loaded(error)}") from None
    # Otherwise the tokenizer_config.json of a published model would say whether this machine was offline.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer
