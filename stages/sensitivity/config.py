"""The `sensitivity` section of a recipe: which models, and which prompts that mean the same.

Light on purpose: imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import Config, Need
from stages.evaluation.config import EvaluationStage, repeated
from stages.models.model_folder import REMOTE_CODE, check_context, check_model
from stages.sensitivity.sets import read_sets


class Vary(Config):
    """Further wordings, made from the first of each row: the same ones in every run, on every machine."""

    spelling: int = Field(default=0, ge=0, le=100)
    """How many copies with spelling errors: in every tenth word, at least one."""
    case: list[Literal["lower", "upper", "title"]] = Field(default_factory=list)
    """Copies in another case."""
    templates: list[str] = Field(default_factory=list)
    """What stands around the words, such as "Q: {prompt}\\nA:"; with choices, {choices} too. The first is that of all
    other wordings, the further ones each give a copy of the first."""

    @field_validator("case", "templates")
    @classmethod
    def _differ(cls, values: list[str]) -> list[str]:
        if found := repeated(values):
            raise ValueError(f"named more than once: {', '.join(found)}")
        return values

    @field_validator("templates")
    @classmethod
    def _hold_the_prompt(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{prompt}") != 1:
                raise ValueError(f"{template!r} should hold {{prompt}} once, where the words go")
        return templates


class Prompts(Config):
    """One file of sets of prompts with the same intent, and how they are asked."""

    name: str
    """What the report calls it."""
    data: str
    """A file. Rows are {"prompts": [wording, ...]} or {"prompt": wording, "paraphrases": [...]}; multiple-choice rows
    hold "choices": [text, ...] as well."""
    vary: Vary = Vary()
    num_fewshot: int = Field(default=0, ge=0)
    """Worked examples before each prompt: the first of `examples` that the row does not ask for itself."""
    examples: str | None = None
    """A file of rows {"prompt", "answer"}, with "choices" where the prompts have them; an answer that is a number is
    that of a choice, from 0."""
    max_new_tokens: int = Field(default=30, ge=1)
    """The longest answer."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise ValueError(f"{name!r} is no name; use up to 100 letters, digits, '_', '-' and '.'")
        return name


class Options(Config):
    """How the models are asked."""

    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template, worked examples as turns."""
    system_instruction: str | None = None
    """A system message before every prompt."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts computed together; moves the speed, not the scores (beyond rounding)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is that of the checkpoint."""
    convention: Literal["paper", "package"] = "paper"
    """The formula. `package` is what prompt-sensitivity-index 0.0.1 computes, to compare with its numbers: it divides
    by max_new_tokens, not by the response's length, and takes for each prompt the responses to the others, where the
    paper takes for each response the other prompts."""


_READ: set[tuple[str, int, tuple[Path, ...]]] = set()
"""Entry, seed and files of the prompts that this process has found to be right: the steps of all models share them."""


class SensitivityStage(EvaluationStage):
    """POSIX of models; lower means that the wording matters less."""

    kind: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 1

    prompts: list[Prompts] = Field(min_length=1)
    """Files of prompts with the same intent, and how they are asked."""
    options: Options = Options()
    seed: int = 23
    """Of the spelling errors."""

    @field_validator("prompts")
    @classmethod
    def _prompts_fit(cls, prompts: list[Prompts]) -> list[Prompts]:
        if found := repeated([each.name for each in prompts]):
            raise ValueError(f"named more than once: {', '.join(found)}")
        for each in prompts:
            if (each.num_fewshot > 0) != (each.examples is not None):
                raise ValueError(f"{each.name}: num_fewshot and examples go together; set both or neither")
        return prompts

    def needs(self) -> dict[str, Need]:
        """The models, and every file."""
        needs = super().needs()
        for i, each in enumerate(self.prompts):
            needs[f"data.{each.name}"] = Need("data", each.data, f"prompts.{i}.data")
            if each.examples is not None:
                needs[f"examples.{each.name}"] = Need("data", each.examples, f"prompts.{i}.examples")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Whether every row gives at least two prompts, there are examples enough, and the model can be loaded."""
        check_model(files["model"], self.trust_remote_code, "models")
        for i, each in enumerate(self.prompts):
            of_it = tuple(path for name, path in sorted(files.items()) if name.endswith(f".{each.name}"))
            if (read := (each.model_dump_json(), self.seed, of_it)) not in _READ:
                read_sets(each, files, self.seed)
                _READ.add(read)
            check_context(files["model"], each.max_new_tokens, f"prompts.{i}.max_new_tokens")

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's."""
        return [REMOTE_CODE] if self.trust_remote_code else []
