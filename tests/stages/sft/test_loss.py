"""The trainer's loss and gradients against the formula, computed independently in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from stages.sft import WITConfig, WITTrainer
from tests.tiny import byte_tokenizer, tiny_model

ROWS = [
    {"prompt": "What is two and two? ", "completion": "Four."},
    {"prompt": "Say hi. ", "completion": "Hi there, friend of mine."},
    {"prompt": "A colour? ", "completion": "Red"},
    {"prompt": "Name a large animal that swims. ", "completion": "A whale."},
]
EIGHT = [
    *ROWS,
    {"prompt": "And now a number? ", "completion": "Seven, or eight."},
    {"prompt": "", "completion": "No prompt at all."},
    {"prompt": "Is it late? ", "completion": "No"},
    {"prompt": "Spell it. ", "completion": "I, t."},
]
WEIGHTS = [(0.0, 1.0), (1.0, 1.0), (0.4, 0.6), (0.5, 0.0)]


def formula(model: LlamaForCausalLM, weights: tuple[float, float], rows: list[dict] = ROWS) -> torch.Tensor:
    """L_WIT of all rows as one step, token by token: one row at a time, no padding, plain softmax."""
    tokenizer = byte_tokenizer()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        prompt = [tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize(row["prompt"])]
        completion = [tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize(row["completion"])]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        for position in range(1, len(ids)):
            weight = weights[0] if position < len(prompt) else weights[1]
            if weight != 0:
                total = total - weight * log_p[position - 1, ids[position]]
                count += 1
    return total / count


class Gradients(TrainerCallback):
    """Saves the gradients of the last step just before the optimiser uses them."""

    def __init__(self) -> None:
        self.saved: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.saved = {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters()}


def train_one_step(
    folder: Path,
    weights: tuple[float, float],
    batch: int,
    accumulation: int,
    rows: list[dict] = ROWS,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Train with WITTrainer; return the logged loss and the gradients of the last optimiser step."""
    gradients = Gradients()
    args = WITConfig(
        output_dir=str(folder),
        prompt_loss_weight=weights[0],
        completion_loss_weight=weights[1],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        **{"max_steps": 1, "activation_checkpointing": False, "use_cpu": True} | fields,
    )
    trainer = WITTrainer(
        model=tiny_model(dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log][-1], gradients.saved


def assert_gradients(gradients: dict[str, torch.Tensor], model: LlamaForCausalLM, bound: float) -> None:
    """Compare with the gradients of `model`, up to a relative error of `bound`."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).norm() / parameter.grad.norm() < bound, name


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_loss_and_every_gradient_are_the_formulas(
    tmp_path: Path, weights: tuple[float, float], batch: int, accumulation: int
) -> None:
    model = tiny_model(dtype=torch.float64)
    expected = formula(model, weights)
    expected.backward()

    loss, gradients = train_one_step(tmp_path, weights, batch, accumulation)

    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_gradients(gradients, model, 1e-6)


def test_equal_weights_scale_the_loss() -> None:
    """The denominator counts tokens instead of summing weights: halving both weights halves the loss."""
    model = tiny_model(dtype=torch.float64)
    assert formula(model, (0.5, 0.5)).item() == pytest.approx(formula(model, (1, 1)).item() / 2)


def test_zero_weight_prompts_do_not_count(tmp_path: Path) -> None:
    """(0.5, 0) divides by the number of prompt tokens."""
    model = copy.deepcopy(tiny_model(dtype=torch.float64))
    half, _ = train_one_step(tmp_path, (0.5, 0.0), 4, 1)
    full, _ = train_one_step(tmp_path, (1.0, 0.0), 4, 1)
    assert half == pytest.approx(full / 2, rel=1e-6)
    assert full == pytest.approx(formula(model, (1.0, 0.0)).item(), rel=1e-6)
