"""A tokenizer that ends every text with EOS, as an evaluation cannot use it."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from stages.base import UserError


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
