"""Packed examples do not see each other: they have the same log-likelihoods as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MistralConfig, Qwen2Config

from stages.base import UserError
from stages.data.segments import weights_by_segment
from stages.sft import WITConfig, WITTrainer
from stages.sft.collator import WeightedCollator
from stages.sft.packing import check_packing
from tests.stages.sft.test_loss import EIGHT
from tests.tiny import byte_tokenizer, tiny_model

SMALL = {"vocab_size": 258, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257}
CONFIGS = {
    "grouped": Qwen2Config(**SMALL, intermediate_size=48, num_hidden_layers=2),
    "sliding window": MistralConfig(**SMALL, intermediate_size=48, num_hidden_layers=2, sliding_window=16),
    "learned positions": GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4),
}


def trainer(folder: Path, model: Any = None, **fields: Any) -> WITTrainer:
    args = WITConfig(
        output_dir=str(folder),
        report_to="none",
        bf16=False,
        use_cpu=fields.pop("use_cpu", True),
        prompt_loss_weight=1.0,
        activation_checkpointing=False,
        save_strategy="no",
        **fields,
    )
    return WITTrainer(
        model=model or tiny_model(),
        args=args,
        train_dataset=Dataset.from_list(EIGHT),
        processing_class=byte_tokenizer(),
    )


def by_example(model: Any, batch: dict[str, torch.Tensor]) -> dict[tuple[int, ...], torch.Tensor]:
    """Token ids of an example -> log-likelihoods of its tokens."""
    packed = "position_ids" in batch
    layout = {"position_ids": batch["position_ids"]} if packed else {"attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        log_p = torch.log_softmax(
            model(input_ids=batch["input_ids"], use_cache=False, **layout).logits.double(), dim=-1
        )
    log_likelihoods = {}
    for row, ids in enumerate(batch["input_ids"].tolist()):
        real = int(batch["attention_mask"][row].sum())
        positions = batch["position_ids"][row, :real].tolist() if packed else list(range(real))
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], real], strict=True):
            log_likelihoods[tuple(ids[start:end])] = torch.stack(
                [log_p[row, t - 1, ids[t]] for t in range(start + 1, end)]
            )
    return log_likelihoods


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_log_likelihoods_are_those_of_examples_alone(
    tmp_path: Path, name: str, attention: str, flatten: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    packs = list(trainer(tmp_path, packing=True, max_length=90).train_dataset)
    assert max(len(pack["seq_lengths"]) for pack in packs) > 1
    packed = by_example(model, WeightedCollator(257, weights_by_segment(1, 1), flatten=flatten)(packs))
    rows = list(trainer(tmp_path).train_dataset)
    alone: dict[tuple[int, ...], torch.Tensor] = {}
    for row in rows:
        alone |= by_example(model, WeightedCollator(257, weights_by_segment(1, 1))([row]))
    assert packed.keys() == alone.keys()
    assert len(alone) == 8
    for ids, expected in alone.items():
        torch.testing.assert_close(packed[ids], expected, rtol=0, atol=1e-5)


def test_a_model_that_mixes_packed_examples_is_refused(tmp_path: Path) -> None:
    """A recurrent state crosses the boundary."""
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=257)
    )
    with pytest.raises(UserError, match="lets examples in one packed row see each other; leave packing"):
        trainer(tmp_path, mamba, packing=True, max_length=90, max_steps=1).train()


def test_the_check_does_not_change_the_model() -> None:
    model = tiny_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_packing(model)
    assert model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_packing_neither_cuts_nor_loses_a_row(tmp_path: Path) -> None:
    packing = trainer(tmp_path, packing=True, max_length=90)
    lengths = [n for pack in packing.train_dataset for n in pack["seq_lengths"]]
    assert sorted(lengths) == sorted(len(row["prompt"] + row["completion"]) + 1 for row in EIGHT)
    assert packing.used["train"].rows_used == 8


def test_truncated_tokens_are_counted(tmp_path: Path) -> None:
    """Also with packing and padding_free, where TRL ignores max_length or drops tokens silently."""
    excess = sum(max(0, len(row["prompt"] + row["completion"]) + 1 - 30) for row in EIGHT)
    assert excess > 0
    for fields in ({}, {"packing": True}, {"padding_free": True}):
        assert trainer(tmp_path, max_length=30, **fields).used["train"].tokens_truncated == excess
