"""The list of what TRL, PEFT, transformers and accelerate take is that of the installed versions."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from trl import DPOConfig, SFTConfig

from stages.base import Context
from stages.library_options.option_docs import HELP, OF_THE_STAGE, collect
from stages.library_options.option_models import (
    LIST,
    RESERVED,
    RESERVED_LAUNCH,
    RESERVED_LORA,
    RESERVED_SFT,
    describe,
    options,
)
from stages.sft.config import SFTStage
from stages.training.loop import arguments


def test_the_list_is_fresh() -> None:
    """Where this fails: python -m stages.library_options.option_models"""
    assert json.loads(LIST.read_text()) == describe()


def test_what_the_libraries_say_of_their_options_is_fresh() -> None:
    """Where this fails: python -m stages.library_options.option_docs, then make schema"""
    said = json.loads(json.dumps(collect()))
    assert json.loads(HELP.read_text()) == said
    defaults = [cls.__dataclass_fields__["learning_rate"].default for cls in (SFTConfig, DPOConfig)]
    assert [said[name]["learning_rate"][0] for name in ("SFTConfig", "DPOConfig")] == defaults
    assert said["LoraConfig"]["r"] == [8, "Lora attention dimension"]
    untold = [name for name, (_, text) in said["launch"].items() if not text]
    assert untold == []


def test_what_a_stage_sets_itself_is_said(tmp_path: Path) -> None:
    """All but what is refused under `train`, and what TRL's own default is."""
    said = {"data": {"train": "rows.jsonl"}, "weights": {"prompt": 0, "completion": 1}}
    config, ignore = SFTStage.model_validate(said), lambda *_: None
    context = Context("recipe", "step", config, {}, tmp_path, tmp_path, tmp_path, tmp_path, ignore, tmp_path)
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    given = {name: value for name, value in arguments(context, {}).items() if name in defaults}
    own = {name for name, value in given.items() if value != defaults[name]} - set(RESERVED)
    assert own
    assert own <= set(OF_THE_STAGE) <= set(options("SFTConfig").model_fields)


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


def test_choices_are_those_of_the_libraries_and_lists_and_booleans_go_on() -> None:
    lora, dpo = options("LoraConfig"), options("DPOConfig")
    for right in (True, False, "pissa", "pissa_niter_16"):
        assert lora(init_lora_weights=right).model_dump() == {"init_lora_weights": right}
    for wrong in ("pisa", "pissa_niter_", "pissa_niter_[number of iters]", 1):
        with pytest.raises(ValidationError):
            lora(init_lora_weights=wrong)
    assert dpo(loss_type=["sigmoid", "sft"], ddp_backend=None, optim="sgd", warmup_steps=0.1)
    for bad in ({"loss_type": ["sigmod"]}, {"optim": "adam"}, {"f_divergence_type": "kl"}, {"log_level": "loud"}):
        with pytest.raises(ValidationError):
            dpo(**bad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logging_steps": 0},
        {"logging_steps": 2.5},
        {"num_train_epochs": 0},
        {"warmup_steps": -1},
        {"adam_beta2": 1.0},
        {"max_steps": -2},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"dataloader_prefetch_factor": 2},
        {"fp16_full_eval": True, "bf16_full_eval": True},
    ],
    ids=lambda wrong: " ".join(wrong),
)
def test_what_training_would_refuse_is_refused_before(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        options("SFTConfig")(**wrong)
