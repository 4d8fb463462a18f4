"""Load the tokenizer of a model folder, of a training or for an evaluation, and the tokens that stop generation."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from stages.base import Context, UserError
from stages.data.tokenization import stop_ids_of
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


def load_step_tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a training step. Raises UserError if it cannot serve the step's rows."""
    stage, inputs = context.config, context.inputs
    first_rows = [next(stage.rows(inputs[split].path, split))[1] for split in ("train", "eval") if split in inputs]
    return load_training_tokenizer(inputs["model"].path, first_rows, stage.trust_remote_code)


def load_training_tokenizer(path: Path, rows: list[Any], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError if it cannot serve `rows`, one or more of each data file."""
    tokenizer = load_tokenizer(path, trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"{path}: the tokenizer has no character offsets; save it as a fast tokenizer")
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so answers would not end; set one")
    values = [value for row in rows for value in row.columns().values()]
    if tokenizer.chat_template is None and any(isinstance(value[0], dict) for value in values if value):
        raise UserError(
            f"{path}: the tokenizer has no chat template, and the rows are messages; use rows of plain text (for"
            " instruction data: 'format: official') or a model with a chat template"
        )
    return tokenizer


def remove_appended_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop a tokenizer from ending every text with EOS, after which a model has nothing to add to a prompt.

    Raises:
        UserError: the tokenizer cannot be changed.
    """
    if not _appends_eos(tokenizer):
        return
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        encoding = backend.encode("a")
        are_special = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
        pieces = [token if special else "$A" for token, special in are_special][:-1]  # all but EOS
        single = [piece for place, piece in enumerate(pieces) if piece != "$A" or "$A" not in pieces[:place]]
        special_tokens = [(piece, backend.token_to_id(piece)) for piece in single if piece != "$A"]
        with suppress(ValueError):  # of a token with a colon, which a template cannot have
            template = TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=special_tokens)
            backend.post_processor = template
    else:
        tokenizer.add_eos_token = False  # of a fast one, this would remove BOS, too
    if _appends_eos(tokenizer):
        raise UserError(
            f"the tokenizer ends every prompt with {tokenizer.eos_token}, so that the model has nothing to add; save it"
            " without this token in its post-processor"
        )


def _appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    eos = tokenizer.eos_token_id
    return eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]


def load_stop_ids(path: Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> set[int]:
    """Return the ids of the tokens that stop generation by the model in `path`."""
    try:
        config = GenerationConfig.from_pretrained(path)
    except OSError:  # the model has no file of its own for it
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = GenerationConfig.from_model_config(model_config)
    return stop_ids_of(tokenizer, config)
