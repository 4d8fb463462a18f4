"""The list of TRL's and PEFT's fields is that of the installed versions."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from stages.options import LIST, RESERVED, RESERVED_LORA, RESERVED_SFT, describe, options


def test_the_list_is_fresh() -> None:
    """Where this fails: python -m stages.options"""
    assert json.loads(LIST.read_text()) == describe()


def test_reserved_fields_exist() -> None:
    """A reserved name that TRL dropped would forbid nothing; only WITConfig's own two are not TRL's."""
    fields = {name: set(declared) for name, declared in describe().items()}
    assert set(RESERVED) <= fields["SFTConfig"] & fields["DPOConfig"]
    assert set(RESERVED_SFT) - fields["SFTConfig"] == {"prompt_loss_weight", "completion_loss_weight"}
    assert set(RESERVED_LORA) <= fields["LoraConfig"]


def test_values_are_checked_and_only_what_is_set_is_handed_on() -> None:
    model = options("SFTConfig")
    assert model(learning_rate=1, report_to=["tensorboard"]).model_dump() == {
        "learning_rate": 1.0,
        "report_to": ["tensorboard"],
    }
    for wrong in ({"learning_rate": "1e-3"}, {"max_steps": 1.5}, {"bf16": "yes"}, {"learning_rte": 1.0}):
        with pytest.raises(ValidationError):
            model(**wrong)
