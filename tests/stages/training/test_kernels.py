"""Attention implementations, torch.compile and Liger change neither the weighted loss nor the published model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import import_utils

import stages.training.config
from stages.base import UserError
from stages.dpo.config import DPOStage
from stages.sft.config import SFTStage
from tests.stages.training.test_lora import LORA, TRAIN, dpo, sft

PLAIN = TRAIN | {"max_steps": 3, "lr_scheduler_type": "constant"}


def losses(out: Path) -> list[float]:
    """The losses of the steps, and of the evaluation after them."""
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """The models published with no such option, without and with an adapter."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        "full": sft(folder / "full", model_folder, train=PLAIN, lora=None),
        "lora": sft(folder / "lora", model_folder, train=PLAIN),
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"model_init_kwargs": {"attn_implementation": "sdpa"}},
        {
            "torch_compile": True,
            "torch_compile_backend": "eager",
        },  # traces the complete model; inductor would take minutes
    ],
    ids=["eager", "sdpa", "compiled"],
)
def test_one_loss_and_one_model(
    tmp_path: Path, model_folder: Path, plain: dict[str, Path], options: dict[str, Any], kind: str
) -> None:
    lora = {"full": None, "lora": LORA}[kind]
    out = sft(tmp_path / "s", model_folder, train=PLAIN | options, lora=lora)
    assert len(losses(out)) == 4
    assert losses(out) == pytest.approx(losses(plain[kind]), abs=1e-5)
    assert {path.name for path in out.iterdir()} == {path.name for path in plain[kind].iterdir()}
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, plain[kind]))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight - expected[name]).abs().max() < 1e-3, name
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_compiled_dpo_is_published_as_a_plain_model(tmp_path: Path, model_folder: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "learning_rate": 0.0, "max_steps": 1}
    out = dpo(tmp_path / "dpo", model_folder, train=TRAIN | compiled)
    start, end = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_an_attention_that_is_not_installed(tmp_path: Path, model_folder: Path) -> None:
    train = PLAIN | {"model_init_kwargs": {"attn_implementation": "flash_attention_3"}}
    with pytest.raises(UserError, match=r"flash_attention_3 does not work here: .*installed"):
        sft(tmp_path / "s", model_folder, train=train, lora=None)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_no_kernel_of_the_hub_replaces_it(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """If the package `kernels` were installed, transformers would fetch and run a kernel of its choice."""
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    train = PLAIN | {"model_init_kwargs": {"attn_implementation": f"flash_attention_{version}"}}
    with pytest.raises(UserError, match="would run a kernel from the hub instead, which is third-party code"):
        sft(tmp_path / "s", model_folder, train=train, lora=None)


@pytest.mark.parametrize("kernel", ["fused_linear_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("stage", [SFTStage, DPOStage])
def test_no_kernel_of_liger_replaces_the_loss(stage: type[Any], kernel: str) -> None:
    train = {"use_liger_kernel": True, "liger_kernel_config": {kernel: True}}
    section: dict[str, Any] = {"data": {"train": "./r"}, "train": train}
    if stage is SFTStage:
        section["weights"] = {"prompt": 0, "completion": 1}
    with pytest.raises(ValidationError, match="another loss than the stage's"):
        stage.model_validate(section)


def test_liger_needs_its_package_and_a_gpu(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SFTStage.model_validate(
        {"data": {"train": "./r"}, "weights": {"prompt": 0, "completion": 1}, "train": {"use_liger_kernel": True}}
    )
    with monkeypatch.context() as patched:
        patched.setattr(stages.training.config, "find_spec", lambda _: None)
        with pytest.raises(UserError, match="pip install liger-kernel"):
            config.check({"model": model_folder})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need a GPU, and there is none here"):
        sft(tmp_path / "s", model_folder, train=PLAIN | {"use_liger_kernel": True}, lora=None)
