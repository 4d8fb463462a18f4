"""The options of TRL, PEFT, transformers and accelerate: those of the installed versions, and checked as there."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from trl import DPOConfig, DPOTrainer, SFTConfig

from docs.generator.json_schema import STAGE_NOTES
from stages.base import Context
from stages.dpo.config import DPOStage
from stages.library_options.option_models import HELP_FILE, OPTIONS_FILE, RESERVED, RULES, options
from stages.sft.config import SFTStage
from stages.training.loop import arguments
from tests.stages.library_options.libraries import collect, describe


def test_options_json_matches_the_installed_libraries() -> None:
    """If this fails: python -m tests.stages.library_options.libraries"""
    assert json.loads(OPTIONS_FILE.read_text()) == describe()


def test_option_help_json_matches_the_installed_libraries() -> None:
    """If this fails: python -m tests.stages.library_options.libraries, then make schema"""
    collected = json.loads(json.dumps(collect()))
    assert json.loads(HELP_FILE.read_text()) == collected
    defaults = [cls.__dataclass_fields__["learning_rate"].default for cls in (SFTConfig, DPOConfig)]
    assert [collected[name]["learning_rate"][0] for name in ("SFTConfig", "DPOConfig")] == defaults
    assert collected["LoraConfig"]["r"] == [8, "Lora attention dimension"]
    assert [name for name, (_, text) in collected["launch"].items() if not text] == []


def test_defaults_that_differ_in_a_stage_are_documented(tmp_path: Path) -> None:
    """All that differ from TRL's, except those that a recipe cannot set."""
    section = {"data": {"train": "rows.jsonl"}, "weights": {"prompt": 0, "completion": 1}}
    config, ignore = SFTStage.model_validate(section), lambda *_: None
    context = Context("recipe", "step", config, {}, tmp_path, tmp_path, tmp_path, tmp_path, ignore, tmp_path)
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    values = {name: value for name, value in arguments(context, {}).items() if name in defaults}
    different = {name for name, value in values.items() if value != defaults[name]} - set(RESERVED["train"])
    assert different
    assert different <= set(STAGE_NOTES) <= set(options("SFTConfig").model_fields)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, (True, None)),
        ({"gradient_checkpointing": False}, (False, None)),
        ({"gradient_checkpointing": None}, (False, None)),
        ({"activation_checkpointing": False}, (False, None)),
        ({"activation_checkpointing": None, "gradient_checkpointing": False}, (False, None)),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, (True, None)),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, (True, {"use_reentrant": True})),
    ],
)
def test_deprecated_names_still_work_without_a_warning(
    tmp_path: Path, section: dict[str, object], expected: tuple[object, ...]
) -> None:
    """A recipe's fingerprint contains the name that it uses, so both names have to work."""
    stage = {"data": {"train": "rows.jsonl"}, "weights": {"prompt": 0, "completion": 1}, "train": section}
    config = SFTStage.model_validate(stage)
    assert config.model_dump()["train"] == section
    context = Context("recipe", "step", config, {}, tmp_path, tmp_path, tmp_path, tmp_path, lambda *_: None)
    fields = arguments(context, config.train.model_dump())
    args = SFTConfig(**{name: value for name, value in fields.items() if name in SFTConfig.__dataclass_fields__})
    assert (args.activation_checkpointing, args.activation_checkpointing_kwargs) == expected
    assert (args.gradient_checkpointing, args.gradient_checkpointing_kwargs) == expected


def test_reserved_fields_exist() -> None:
    """A reserved name that TRL drops would forbid nothing. Only the two of WITConfig are not TRL's."""
    fields = {name: set(declared) for name, declared in describe().items()}
    assert set(RESERVED["train"]) <= fields["SFTConfig"] & fields["DPOConfig"]
    assert set(RESERVED["SFTConfig"]) - fields["SFTConfig"] == {"prompt_loss_weight", "completion_loss_weight"}
    assert set(RESERVED["LoraConfig"]) <= fields["LoraConfig"]
    assert all(fnmatch.filter(fields["launch"], pattern) for pattern in RESERVED["launch"])


def test_options_of_a_command_are_checked() -> None:
    model = options("launch")
    section = {"num_processes": 2, "use_fsdp": True, "fsdp_version": 2, "fsdp_offload_params": True}
    assert model(**section).model_dump() == section
    assert model.reserved["config_file"]
    assert model.reserved["megatron_lm_pp_degree"] == RESERVED["launch"]["megatron_lm_*"]
    bad_sections = [
        {"num_processes": "2"},
        {"zero_stage": 3},
        {"fsdp_version": "3"},
        {"dynamo_backend": "quick"},
        {"use_fsdp": "yes"},
    ]
    for bad in [*bad_sections, {"config_file": "a"}]:
        with pytest.raises(ValidationError):
            model(**bad)


def test_values_are_checked_and_only_set_ones_are_passed_on() -> None:
    model = options("SFTConfig")
    assert model(learning_rate=1, report_to=["tensorboard"]).model_dump() == {
        "learning_rate": 1.0,
        "report_to": ["tensorboard"],
    }
    for bad in ({"learning_rate": "1e-3"}, {"max_steps": 1.5}, {"bf16": "yes"}, {"learning_rte": 1.0}):
        with pytest.raises(ValidationError):
            model(**bad)


def test_choices_are_those_of_the_libraries() -> None:
    lora, dpo = options("LoraConfig"), options("DPOConfig")
    for method in (True, False, "pissa", "pissa_niter_16"):
        assert lora(init_lora_weights=method).model_dump() == {"init_lora_weights": method}
    for unknown in ("pisa", "pissa_niter_", "pissa_niter_[number of iters]", 1):
        with pytest.raises(ValidationError):
            lora(init_lora_weights=unknown)
    assert dpo(loss_type=["sigmoid", "sft"], ddp_backend=None, optim="sgd", warmup_steps=0.1)
    for bad in ({"loss_type": ["sigmod"]}, {"optim": "adam"}, {"f_divergence_type": "kl"}, {"log_level": "loud"}):
        with pytest.raises(ValidationError):
            dpo(**bad)


@pytest.mark.parametrize(
    "section",
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
    ids=lambda section: " ".join(section),
)
def test_options_that_training_would_refuse_are_refused_before(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        options("SFTConfig")(**section)


def test_scheduler_options_are_those_of_transformers() -> None:
    """Keys that get_scheduler itself sets are left out; a scheduler that is not listed passes any key on."""
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert set(RULES["scheduler_options"]) == set(functions) - {"reduce_lr_on_plateau", "greedy"}
    for name, keys in RULES["scheduler_options"].items():
        assert set(keys) == set(inspect.signature(functions[name]).parameters) - own, name


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy"),
        ({"padding_free": True}, "padding_free"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"discopop_tau": 0.1}, "discopop_tau"),
        ({"precompute_ref_batch_size": 2}, "precompute_ref_batch_size"),
        ({"ref_model_sync_steps": 2}, "ref_model_sync_steps"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs.num_cycles"),
        ({"f_divergence_type": "js_divergence", "loss_type": ["apo_zero"]}, "f_divergence_type"),
        ({"use_weighting": True, "loss_type": ["aot"]}, "use_weighting"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules"),
        ({"label_names": ["x"]}, "label_names"),
    ],
)
def test_options_that_dpo_would_ignore_or_fail_on_are_refused(section: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError) as error:
        DPOStage.model_validate({"data": {"train": "pairs.jsonl"}, "train": section})
    details = error.value.errors()[0]
    blamed = details["ctx"]["key"].removeprefix("train.") if "key" in details.get("ctx", {}) else details["loc"][-1]
    assert blamed == key


def test_losses_with_other_divergences_are_those_of_trl() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    (names,) = re.findall(r"f_divergence_loss_types = \{(.*?)\}", source)
    able = set(re.findall(r"\w+", names))
    (rule,) = [rule for rule in RULES["conflicts"] if rule[0] == "f_divergence_type"]
    described = json.loads(OPTIONS_FILE.read_text())["DPOConfig"]
    losses = {choice.partition("=")[2] for choice in described["loss_type"]}
    assert set(rule[3]) == losses - able
    divergences = {choice.partition("=")[2] for choice in described["f_divergence_type"]}
    assert set(rule[1]) == divergences - {"reverse_kl"}


def test_options_that_work_stay_accepted() -> None:
    sft = {"train_sampling_strategy": "group_by_length", "auto_find_batch_size": True, "neftune_noise_alpha": 5}
    cosine = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}
    dpo = {"padding_free": False, "label_smoothing": 0.1, "loss_type": ["robust"], "sync_ref_model": True}
    assert options("SFTConfig")(**sft, **cosine, include_num_input_tokens_seen=True)
    assert options("DPOConfig")(**dpo, **cosine, ref_model_sync_steps=2, train_sampling_strategy="sequential")
