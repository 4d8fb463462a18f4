"""The CPU head against the formula in float64 and against the models' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
)

from stages.sft import head as heads
from stages.sft.head import add_weighted_head

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "soft cap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "scaled": CohereConfig(**SMALL, logit_scale=0.25),
    "divided": GraniteConfig(**SMALL, logits_scaling=4.0),
    "bias": PhiConfig(**SMALL),
    "other names": GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5),
}
INPUT_IDS = torch.tensor([[3, 17, 60, 5, 9, 33, 2, 0], [41, 7, 7, 12, 58, 2, 0, 0]])
WEIGHTS = torch.tensor([[0, 0.5, 0.5, 0, 2.0, 1, 1, 0], [0, 0, 0, 0.25, 1, 1, 0, 0]])
LABELS = INPUT_IDS.masked_fill(WEIGHTS == 0, -100)


def build(config: Any, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)  # its initial zeros would hide errors
    return model


def by_formula(model: PreTrainedModel) -> torch.Tensor:
    """Sum of weight times negative log-likelihood, token by token, from the model's own logits."""
    total = torch.zeros((), dtype=torch.float64)
    log_p = torch.log_softmax(model(input_ids=INPUT_IDS).logits.double(), dim=-1)
    for row in range(2):
        for position in range(1, 8):
            total = total - WEIGHTS[row, position] * log_p[row, position - 1, INPUT_IDS[row, position]]
    return total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_loss_and_every_gradient(name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * 61 * rows_at_once)
    model = build(CONFIGS[name])
    expected = by_formula(model)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()

    assert add_weighted_head(model)
    loss = model(input_ids=INPUT_IDS, labels=LABELS, loss_weights=WEIGHTS).weighted_nll
    (3 * loss).backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for key, parameter in model.named_parameters():
        error = (parameter.grad / 3 - gradients[key]).norm() / gradients[key].norm()
        assert error < 1e-6, key  # RMS norms compute in float32 whatever the model's dtype is


def test_log_likelihoods_and_top_tokens() -> None:
    model = build(CONFIGS["tied"])
    logits = model(input_ids=INPUT_IDS).logits[:, :-1]
    add_weighted_head(model)
    with torch.no_grad():
        out = model(input_ids=INPUT_IDS, labels=LABELS, loss_weights=WEIGHTS)
    scored = LABELS[:, 1:] != -100
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, INPUT_IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs, chosen.masked_fill(~scored, 0))
    assert torch.equal(out.is_top1, (logits.argmax(-1) == INPUT_IDS[:, 1:]) & scored)


def test_a_frozen_head_under_lora_gets_no_gradient() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = build(CONFIGS["untied"])
    plain = get_peft_model(build(CONFIGS["untied"]), config)
    assert add_weighted_head(model)
    wrapped = get_peft_model(model, config)
    wrapped.load_state_dict(plain.state_dict())
    by_formula(plain).backward()
    wrapped(input_ids=INPUT_IDS, labels=LABELS, loss_weights=WEIGHTS).weighted_nll.backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.requires_grad}
    gradients = {key: p.grad for key, p in wrapped.named_parameters() if p.requires_grad}
    assert expected
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).norm() <= 1e-6 * gradient.norm(), key
    assert wrapped.get_output_embeddings().weight.grad is None


def test_bfloat16_by_autocast() -> None:
    """Logits in bfloat16 with float32 sums: the loss is close to the float32 loss, and gradients are float32."""
    model = build(CONFIGS["untied"], torch.float32)
    expected = by_formula(model).item()
    add_weighted_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=INPUT_IDS, labels=LABELS, loss_weights=WEIGHTS).weighted_nll
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_bfloat16_gradients_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over chunks are float32, so many chunks are as accurate as one."""
    torch.manual_seed(0)
    model = build(CONFIGS["untied"], torch.float32)
    add_weighted_head(model)
    ids = torch.randint(3, 61, (16, 64))
    exact = model(input_ids=ids).logits.double()
    gradients = []
    for rows_at_once in (10_000, 4):
        monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * 61 * rows_at_once)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids, loss_weights=torch.ones(16, 64)).weighted_nll.backward()
        gradients.append(model.get_output_embeddings().weight.grad.clone())
    model.zero_grad()
    torch.nn.functional.cross_entropy(exact[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    truth = model.get_output_embeddings().weight.grad
    one, many = ((gradient - truth).norm() / truth.norm() for gradient in gradients)
    assert many < 1.2 * one


def test_a_batch_without_weights_has_a_zero_gradient() -> None:
    model = build(CONFIGS["tied"])
    add_weighted_head(model)
    zeros = torch.zeros_like(WEIGHTS)
    labels = torch.full_like(LABELS, -100)
    model(input_ids=INPUT_IDS, labels=labels, loss_weights=zeros).weighted_nll.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_other_models_keep_trls_head() -> None:
    """A mixture of experts, which has an auxiliary loss, and logits that are not the head's projection."""
    experts = build(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))
    assert not add_weighted_head(experts)

    odd = build(CONFIGS["tied"])
    odd.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + logits.square())
    assert not add_weighted_head(odd)
    assert odd(input_ids=INPUT_IDS).logits.shape == (2, 8, 61)


def test_without_weights_the_forward_is_the_models_own() -> None:
    model, patched = build(CONFIGS["soft cap"]), build(CONFIGS["soft cap"])
    add_weighted_head(patched)
    assert torch.equal(model(input_ids=INPUT_IDS).logits, patched(input_ids=INPUT_IDS).logits)
