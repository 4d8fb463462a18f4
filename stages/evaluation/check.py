"""Check a stage that scores a model before it runs: the model's config and its tokenizer, without any weights."""

from functools import cache

from stages.base import Context, Findings, UserError
from stages.models.generation_config import NOT_USED, describe, read_generation_config, set_values
from stages.models.model_size import build
from stages.models.tokenizer import load_tokenizer, remove_appended_eos

_load_tokenizer = cache(load_tokenizer)  # the steps of several stages share models


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. `on_this_machine` says that it will run on the machine of this process."""
    findings = Findings()
    check_model(context, findings)
    return findings


def check_model(context: Context, findings: Findings) -> None:
    """Check the step's model and tokenizer, and that the tokenizer has the chat template that the stage uses."""
    path = context.inputs["model"].path
    options = getattr(context.config, "options", None)  # not every kind of stage has any
    with findings.part("model", "models"):
        build(path, "auto", context.config.trust_remote_code)
        defaults = set_values(read_generation_config(path))
        findings.notes += [("models", note) for note in describe(f"{context.config.models[0]}: {NOT_USED}", defaults)]
    with findings.part("tokenizer", "models"):
        tokenizer = _load_tokenizer(path, context.config.trust_remote_code)
        remove_appended_eos(tokenizer)
        uses_template = getattr(options, "apply_chat_template", None)
        if uses_template and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {path} has no chat template; set it to false, or add a template to the model",
                "options.apply_chat_template",
            )
        if uses_template is False and tokenizer.chat_template:
            text = "is false, but the model has a chat template; set it to true if the model was trained with it"
            findings.notes.append(("options.apply_chat_template", text))
