"""LoRA and QLoRA publish the full model, with the adapter merged into unquantised weights."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages.base import UserError
from stages.dpo.config import DPOStage
from stages.sft.config import SFTStage
from stages.training.model_io import load_model
from tests.tiny import byte_tokenizer, run_training, tiny_model

LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "down_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TRAIN = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True}
ROWS = [{"prompt": "Sky? ", "completion": "blue"}, {"prompt": "Snow? ", "completion": "a white one"}]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "red"} for row in ROWS]

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are multiples of 64, the block size of bitsandbytes."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny_model().config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def sft(folder: Path, model: Path, **section: Any) -> Path:
    weights = {"prompt": 0.5, "completion": 1}
    config = {"data": {"train": "./r", "eval": "./r"}, "weights": weights, "train": TRAIN, "lora": LORA, **section}
    return run_training(folder, model, ROWS, SFTStage.model_validate(config), ("train", "eval"))


def dpo(folder: Path, model: Path, **section: Any) -> Path:
    config = {"data": {"train": "./r"}, "train": TRAIN, **section}
    return run_training(folder, model, PAIRS, DPOStage.model_validate(config), ("train", "eval"))


def assert_merged(base: Path, out: Path) -> None:
    """Adapted weights are W + (alpha / r) B A, computed in float64; all others are unchanged, in one plain model."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    adapted = 0
    for name, weight in before.items():
        expected = weight.double()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            a, b = (adapter[f"{key}.lora_{part}.weight"].double() for part in "AB")
            expected = expected + LORA["lora_alpha"] / LORA["r"] * b @ a  # type: ignore[operator]
            assert (after[name] - weight).abs().max() > 1e-3, "training moved it"
            adapted += 1
        assert after[name].dtype == torch.float32
        assert (after[name].double() - expected).abs().max() < 1e-6, name
    assert adapted == len(adapter) / 2 == 6
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def first_row(out: Path) -> dict[str, Any]:
    return json.loads((out / "training_log.jsonl").read_text().splitlines()[0])


def test_lora_publishes_the_merged_model_and_dpo_starts_from_it(tmp_path: Path, model_folder: Path) -> None:
    """At a learning rate of 0, DPO publishes the model that it started from: the merged one, to the byte."""
    out = sft(tmp_path / "sft", model_folder)
    assert_merged(model_folder, out)
    again = sft(tmp_path / "again", model_folder)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    still = dpo(tmp_path / "dpo", out, train=TRAIN | {"learning_rate": 0.0, "max_steps": 1})
    assert first_row(still)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    start, end = (load_file(folder / "model.safetensors") for folder in (out, still))
    assert all(torch.equal(start[name], end[name]) for name in start)


@needs_bitsandbytes
def test_qlora_publishes_a_full_precision_merge(tmp_path: Path, wide_folder: Path) -> None:
    """An adapter that trained on 4-bit weights is merged into the unquantised ones, and quantised DPO starts there."""
    out = sft(tmp_path / "sft", wide_folder, quantization=NF4)
    assert_merged(wide_folder, out)
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0]
    full = sft(tmp_path / "full", wide_folder)
    assert losses[0] != first_row(full)["loss"], "quantised weights give another loss"
    assert losses[0] == pytest.approx(first_row(full)["loss"], rel=0.05)
    preferred = dpo(tmp_path / "dpo", out, lora=LORA, quantization=NF4)
    assert first_row(preferred)["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert_merged(out, preferred)


@needs_bitsandbytes
def test_an_evaluation_in_between_changes_no_4bit_training(tmp_path: Path, wide_folder: Path) -> None:
    """bitsandbytes' CPU kernel for evaluation has no gradient: if it stayed in place, training would stop."""
    evaluated = TRAIN | {"eval_strategy": "steps", "eval_steps": 2}
    trainings = {"plain": TRAIN, "evaluated": evaluated}
    outs = [sft(tmp_path / name, wide_folder, quantization=NF4, train=train) for name, train in trainings.items()]
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in outs]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_quantisation_without_bitsandbytes(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SFTStage.model_validate(
        {"data": {"train": "./r"}, "weights": {"prompt": 0, "completion": 1}, "lora": LORA, "quantization": NF4}
    ).quantization
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"bitsandbytes is not installed; pip install -e '\.\[qlora\]'"):
        load_model(model_folder, 0, None, quantization=section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quantization": NF4}, "quantised weights cannot be trained; add 'lora'"),
        ({"quantization": {}, "lora": LORA}, "load_in_4bit: true"),
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}, "lora": LORA}, "set one of"),
        ({"quantization": NF4 | {"bnb_4bit_quant_type": "nf5"}, "lora": LORA}, "'nf4' or 'fp4'"),
        ({"quantization": NF4 | {"bnb_4bit_compute_dtype": "bf16"}, "lora": LORA}, "'bfloat16'"),
    ],
)
def test_the_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DPOStage.model_validate({"data": {"train": "./r"}, **section})
    assert message in str(caught.value)
