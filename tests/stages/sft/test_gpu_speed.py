"""What keeps a GPU busy, tested on a CPU: one shape for torch.compile, figures that are read once for each log, MFU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, TrainerCallback

import stages.sft.trainer
from stages.base import UserError
from stages.data.segments import weights_by_segment
from stages.sft import WITConfig, WITTrainer
from stages.sft.collator import PackShape, WeightedCollator
from stages.sft.mfu import model_flops, peak_flops
from tests.stages.sft.test_loss import EIGHT, assert_gradients, formula, train_one_step
from tests.tiny import byte_tokenizer, tiny_model

PACKED = {"packing": True, "max_length": 90}
COMPILED = PACKED | {"torch_compile": True, "torch_compile_backend": "eager"}


def trainer(folder: Path, model: Any = None, **fields: Any) -> WITTrainer:
    fields = {"prompt_loss_weight": 0.4, "completion_loss_weight": 0.6, "logging_steps": 1} | fields
    fields |= {"report_to": "none", "bf16": False, "use_cpu": True, "activation_checkpointing": False}
    args = WITConfig(output_dir=str(folder), save_strategy="no", **fields)
    return WITTrainer(model or tiny_model(), args, Dataset.from_list(EIGHT), processing_class=byte_tokenizer())


@pytest.mark.parametrize("padding_free", [False, True])
def test_compiled_packs_have_one_shape(tmp_path: Path, padding_free: bool) -> None:
    """Packs of different lengths and numbers of examples, a smaller last batch: nothing is compiled twice."""
    fields = COMPILED | {"per_device_train_batch_size": 2, "num_train_epochs": 2, "padding_free": padding_free}
    torch._dynamo.reset()
    training = trainer(tmp_path, **fields)
    examples = [len(pack["seq_lengths"]) for pack in training.train_dataset]
    assert len(set(examples)) > 1
    assert len(examples) % 2 == 1
    batches = []
    collate = training.data_collator
    training.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        training.train()
    assert len(batches) >= 4
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, 180) if padding_free else (2, 90)}


@pytest.mark.parametrize("padding_free", [False, True])
def test_compiled_packs_have_the_loss_and_gradients_of_the_formula(tmp_path: Path, padding_free: bool) -> None:
    model, weights, fields = tiny_model(dtype=torch.float64), (0.25, 0.5), COMPILED | {"padding_free": padding_free}
    expected = formula(model, weights, EIGHT)
    expected.backward()
    loss, gradients = train_one_step(tmp_path, weights, 2, 4, EIGHT, torch.float64, **fields)
    assert loss == pytest.approx(expected.item(), rel=1e-7)  # transformers sums it in float32
    assert_gradients({name.removeprefix("_orig_mod."): grad for name, grad in gradients.items()}, model, 1e-9)


SHAPE = PackShape(rows=2, length=6, examples=5)
PACKS = [
    {"input_ids": [1, 2, 3, 4, 5], "segments": [1] * 5, "seq_lengths": [3, 2], "row": [1, 1, 1, 2, 2]},
    {"input_ids": [6, 7, 8], "segments": [1] * 3, "seq_lengths": [1, 1, 1], "row": [3, 4, 5]},
]


def test_a_fixed_shape_by_hand() -> None:
    """The second batch has a pack too few; padding restarts after `length`, the longest that the kernel expects."""
    collate = WeightedCollator(0, weights_by_segment(1, 1), flatten=True, boundaries=True, shape=SHAPE)
    first, second = collate(PACKS), collate(PACKS[:1])
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0, 0, 1, 2, 3]]
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 7, 8, 12, 12]
    assert second["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 0]]
    assert second["cu_seq_lens_k"].tolist() == [0, 3, 5, 11, 12, 12, 12, 12]
    assert first["max_length_q"] == second["max_length_k"] == 6
    assert first["attention_mask"].sum() == 8
    rows = WeightedCollator(0, weights_by_segment(1, 1), shape=SHAPE)(PACKS[:1])
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert rows["labels"].tolist() == [[-100, 2, 3, -100, 5, -100], [-100] * 6]


def test_boundaries_without_a_fixed_shape() -> None:
    batch = WeightedCollator(0, weights_by_segment(1, 1), flatten=True, boundaries=True)(PACKS)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 7, 8]
    assert batch["max_length_q"] == 3


def by_boundaries(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    """Attention that reads only the boundaries, as flash attention does: within each example, causal. Without them,
    in the checks before a training, it takes them from the positions, as transformers does."""
    if "cu_seq_lens_q" in kwargs:
        cu_seq_lens, longest = kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_q"]
    else:
        assert not module.training
        positions = kwargs.get("position_ids")
        starts = [0] if positions is None else (positions[0] == 0).nonzero()[:, 0].tolist()
        cu_seq_lens, longest = [*starts, query.shape[2]], query.shape[2]
    outputs = []
    for start, end in itertools.pairwise(cu_seq_lens):
        assert end - start <= longest
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("fields", [PACKED, COMPILED, {"padding_free": True}], ids=["packed", "fixed", "padding-free"])
def test_attention_by_boundaries_has_the_loss_of_the_formula(tmp_path: Path, fields: dict[str, Any]) -> None:
    AttentionInterface.register("flash_by_boundaries", by_boundaries)
    AttentionMaskInterface.register("flash_by_boundaries", lambda *args, **kwargs: None)
    model = tiny_model(dtype=torch.float64)
    expected = formula(model, (0.25, 0.5), EIGHT).item()
    model.config._attn_implementation = "flash_by_boundaries"
    fields = {"prompt_loss_weight": 0.25, "completion_loss_weight": 0.5, "max_steps": 1} | fields
    torch._dynamo.reset()
    training = trainer(tmp_path, model, per_device_train_batch_size=8, **fields)
    training.train()
    assert training.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


class Break(TrainerCallback):
    """Makes the weights infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step + 1 == self.step:
            model.model.norm.weight.data.fill_(float("inf"))


@pytest.mark.parametrize("fields", [{"logging_steps": 2}, {"logging_steps": 100}], ids=["log", "end"])
def test_a_loss_that_is_not_finite_is_found_later_and_names_its_step(tmp_path: Path, fields: dict[str, Any]) -> None:
    training = trainer(tmp_path, max_steps=4, per_device_train_batch_size=4, **fields)
    training.add_callback(Break(3))
    with pytest.raises(
        UserError, match=r"^step 3: the loss is not finite at learning rate .* data rows: \d, \d, \d, \d$"
    ):
        training.train()
    assert training.state.global_step == 4


def test_no_checkpoint_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    training = trainer(tmp_path, max_steps=4, logging_steps=100)
    training.args.save_strategy, training.args.save_steps = "steps", 2
    training.state.save_steps = 2
    training.add_callback(Break(3))
    with pytest.raises(UserError, match=r"^step 3: the loss is not finite"):
        training.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def test_one_transfer_for_each_log(tmp_path: Path) -> None:
    training = trainer(
        tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_steps=2, per_device_train_batch_size=2
    )
    gather, sizes = training.accelerator.gather, []
    training.accelerator.gather = lambda tensor: sizes.append(tuple(tensor.shape)) or gather(tensor)
    training.train()
    assert sizes == [(1, 4, 6)] * 2
    lengths = [len(row["input_ids"]) for row in training.train_dataset]
    assert training.state.log_history[1]["num_tokens"] == 2 * sum(lengths)


TINY_N = 258 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32
"""Tied embedding; in each layer q and o, k and v, the MLP, two norms; the last norm."""


def test_mfu_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.sft.trainer, "peak_flops", lambda device: 1e9)
    for layout in ({}, PACKED):
        training = trainer(tmp_path, max_steps=1, per_device_train_batch_size=8, **layout)
        training.train()
        log = training.state.log_history[0]
        rows = [training.train_dataset["input_ids"], training.train_dataset["seq_lengths"] if layout else None]
        lengths = [n for pack in rows[1] for n in pack] if layout else [len(ids) for ids in rows[0]]
        assert len(lengths) == 8
        flops = 6 * TINY_N * sum(lengths) + 12 * 2 * 4 * 8 * sum(n * (n + 1) / 2 for n in lengths)
        assert log["mfu"] * 1e9 == pytest.approx(flops * log["tokens_per_second"] / sum(lengths), rel=1e-6)


def test_no_mfu_on_a_cpu(tmp_path: Path) -> None:
    training = trainer(tmp_path, max_steps=1)
    training.train()
    assert "mfu" not in training.state.log_history[0]


def test_flops_of_an_untied_model_and_of_an_adapter() -> None:
    untied = LlamaForCausalLM(LlamaConfig(**tiny_model().config.to_diff_dict() | {"tie_word_embeddings": False}))
    assert model_flops(untied) == (6 * TINY_N, 12 * 2 * 32)  # the table is only looked up, the head multiplies
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    lora = 2 * 2 * (32 + 32)
    assert model_flops(adapted) == (4 * (TINY_N + lora) + 2 * lora, 12 * 2 * 32)


def test_llama_1b_at_45_000_tokens_per_second() -> None:
    """1,235,814,400 weights, as the model's card says 1.23 B; 989 TFLOP/s on an H100 or H200."""
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "head_dim": 64,
    }
    with torch.device("meta"):
        config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
        flops = model_flops(LlamaForCausalLM(config))
    assert flops == (6 * 1_235_814_400, 12 * 16 * 2048)
    assert 45_000 * flops[0] / 989e12 == pytest.approx(0.337, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
