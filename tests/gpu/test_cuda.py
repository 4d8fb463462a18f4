"""The layouts of tests/stages/sft on a CUDA device, where TRL's fused head serves: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from stages.data.segments import weights_by_segment
from stages.sft.collator import WeightedCollator
from tests.stages.sft.test_layouts import LAYOUTS, assert_formula
from tests.stages.sft.test_loss import WEIGHTS
from tests.stages.sft.test_packing import SMALL, by_example, trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loss_in_every_layout(tmp_path: Path, layout: str, weights: tuple[float, float]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_formula(tmp_path, layout, weights, use_cpu=False, tf32=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_on_packs_has_the_loss_of_sdpa(tmp_path: Path, compiled: bool) -> None:
    """The boundaries of a fixed shape end with examples that have no token."""
    pytest.importorskip("flash_attn")
    losses = []
    for attention in ("sdpa", "flash_attention_2"):
        config = Qwen2Config(**SMALL | {"num_attention_heads": 2}, intermediate_size=48, num_hidden_layers=2)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        fields = {"packing": True, "max_length": 90, "torch_compile": compiled, "max_steps": 3, "logging_steps": 1}
        training = trainer(tmp_path / attention, model, **fields | {"use_cpu": False, "learning_rate": 1e-3})
        training.train()
        losses.append([log["loss"] for log in training.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("flatten", [False, True])
def test_packed_log_likelihoods_are_those_of_examples_alone(tmp_path: Path, flatten: bool) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, intermediate_size=48, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().cuda()

    def on_gpu(rows: list[dict], flatten: bool = False) -> dict[str, torch.Tensor]:
        batch = WeightedCollator(257, weights_by_segment(1, 1), flatten=flatten)(rows)
        return {name: value.cuda() for name, value in batch.items() if isinstance(value, torch.Tensor)}

    packed = by_example(model, on_gpu(list(trainer(tmp_path, packing=True, max_length=90).train_dataset), flatten))
    alone: dict[tuple[int, ...], torch.Tensor] = {}
    for row in list(trainer(tmp_path).train_dataset):
        alone |= by_example(model, on_gpu([row]))
    assert packed.keys() == alone.keys()
    for ids, expected in alone.items():
        torch.testing.assert_close(packed[ids], expected, rtol=0, atol=1e-5)
