"""What a checkpoint would change in an evaluation: its generation defaults, and an EOS token behind every prompt."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stages.base import UserError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What remains of a checkpoint's generation config."""
NO_EFFECT = (
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)


def remove_generation_defaults(model: Any) -> dict[str, Any]:
    """Leave a model's special tokens in its generation config, and return what else it set, such as a penalty.

    Else `generate` would use whatever the caller does not set, num_beams in greedy decoding among it.
    """
    config = model.generation_config
    if config is None:
        return {}
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in TOKENS})
    set_values = config.to_diff_dict().items()
    return {k: v for k, v in set_values if not k.startswith("_") and k not in (*TOKENS, *NO_EFFECT) and v is not None}


def describe_defaults(name: str, defaults: dict[str, Any]) -> list[str]:
    """Return the console's note about the defaults that were removed."""
    values = ", ".join(f"{key}: {json.dumps(value, default=str)}" for key, value in defaults.items())
    text = f"{name}: the checkpoint's generation defaults are not used, since they would change its scores: {values}"
    return [text] if defaults else []


def remove_appended_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop a tokenizer from ending every text with EOS, after which a model has nothing to add to a prompt.

    Raises:
        UserError: the tokenizer cannot be changed.
    """
    if not _appends_eos(tokenizer):
        return
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        state["post_processor"] = _without_last(state["post_processor"], str(tokenizer.eos_token))
        backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
    else:
        tokenizer.add_eos_token = False  # of a fast one, this would remove BOS, too
    if _appends_eos(tokenizer):
        raise UserError(
            f"the tokenizer ends every prompt with {tokenizer.eos_token}, so that the model has nothing to add; save it"
            " without this token in its post-processor"
        )


def _without_last(processor: dict[str, Any], token: str) -> dict[str, Any]:
    """A post-processor of the library tokenizers that does not add `token` behind a text."""
    if processor["type"] == "Sequence":
        return processor | {"processors": [_without_last(each, token) for each in processor["processors"]]}
    if processor["type"] in ("BertProcessing", "RobertaProcessing") and processor["sep"][0] == token:
        name, number = processor["cls"]
        first = {"SpecialToken": {"id": name, "type_id": 0}}
        texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
        special_tokens = {name: {"id": name, "ids": [number], "tokens": [name]}}
        template = {"type": "TemplateProcessing", "single": [first, texts[0]], "pair": [first, *texts]}
        return template | {"special_tokens": special_tokens}
    forms = {form: processor[form] for form in ("single", "pair") if isinstance(processor.get(form), list)}
    is_last = {form: pieces[-1].get("SpecialToken", {}).get("id") == token for form, pieces in forms.items()}
    return processor | {form: pieces[:-1] if is_last[form] else pieces for form, pieces in forms.items()}


def _appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    eos = tokenizer.eos_token_id
    return eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]
