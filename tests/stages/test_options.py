"""The list of what TRL, PEFT, transformers and accelerate take is that of the installed versions."""

from __future__ import annotations

import fnmatch
import json

import pytest
from pydantic import ValidationError

from stages.options import LIST, RESERVED, RESERVED_LAUNCH, RESERVED_LORA, RESERVED_SFT, describe, options


def test_the_list_is_fresh() -> None:
    """Where this fails: python -m stages.options"""
    assert json.loads(LIST.read_text()) == describe()


def test_reserved_fields_exist() -> None:
    """A reserved name that TRL dropped would forbid nothing; only WITConfig's own two are not TRL's."""
    fields = {name: set(declared) for name, declared in describe().items()}
    assert set(RESERVED) <= fields["SFTConfig"] & fields["DPOConfig"]
    assert set(RESERVED_SFT) - fields["SFTConfig"] == {"prompt_loss_weight", "completion_loss_weight"}
    assert set(RESERVED_LORA) <= fields["LoraConfig"]
    assert all(fnmatch.filter(fields["launch"], pattern) for pattern in RESERVED_LAUNCH)


def test_options_of_a_command_are_checked() -> None:
    model = options("launch")
    given = {"num_processes": 2, "use_fsdp": True, "fsdp_version": 2, "fsdp_offload_params": True, "zero_stage": 3}
    assert model(**given).model_dump() == given
    assert model.reserved["config_file"]
    assert model.reserved["megatron_lm_pp_degree"] == RESERVED_LAUNCH["megatron_lm_*"]
    wrongs = [{"num_processes": "2"}, {"fsdp_version": "3"}, {"dynamo_backend": "quick"}, {"use_fsdp": "yes"}]
    for wrong in [*wrongs, {"config_file": "a"}]:
        with pytest.raises(ValidationError):
            model(**wrong)


def test_values_are_checked_and_only_what_is_set_is_handed_on() -> None:
    model = options("SFTConfig")
    assert model(learning_rate=1, report_to=["tensorboard"]).model_dump() == {
        "learning_rate": 1.0,
        "report_to": ["tensorboard"],
    }
    for wrong in ({"learning_rate": "1e-3"}, {"max_steps": 1.5}, {"bf16": "yes"}, {"learning_rte": 1.0}):
        with pytest.raises(ValidationError):
            model(**wrong)
