"""The weighted loss from the hidden states, for CPUs, where TRL's fused head scores every position and computes the
logits twice.

Positions of weight 0 are dropped before the projection. The logits are computed in chunks of a few positions, and the
gradient together with the loss, from the same chunk:

    L = sum_t w_t (log sum_v exp z_tv - z_t,y),    dL/dz_tv = w_t (softmax(z_t)_v - 1[v = y])

(the numerator of the WIT loss; Chatterjee et al., TACL 2025, section 3).
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

CHUNK_BYTES = 48 * 2**20  # of a chunk's float32 logits, at most


@dataclass
class WeightedOutput(ModelOutput):
    """Output of a model called with `loss_weights`. As in TRL's head, [:, t] belongs to token t + 1."""

    weighted_nll: Tensor | None = None
    """() float: sum over tokens of weight times negative log-likelihood; the only field with a gradient."""
    log_probs: Tensor | None = None
    """(rows, length - 1) float32: log-likelihood of each scored token, 0 elsewhere."""
    is_top1: Tensor | None = None
    """(rows, length - 1) bool: scored, and the most likely token."""


@dataclass(frozen=True)
class Head:
    """The map from last hidden states to logits: cap * tanh((W h + b) * scale / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Compute logits (rows, vocabulary), float32 or wider, in the memory of `out` if its dtype fits."""
        if out is None or out.dtype != weight.dtype:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        elif bias is None:
            logits = torch.mm(hidden, weight.t(), out=out)
        else:
            logits = torch.addmm(bias, hidden, weight.t(), out=out)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class _WeightedNLL(torch.autograd.Function):
    """hidden (n, d), weight (v, d), bias (v) or None, targets (n), weights (n) -> the fields of WeightedOutput, (n)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, head, grad_enabled):  # type: ignore[no-untyped-def]
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
        needs_grad = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            *outputs, ctx.gradients = _forward(hidden, weight, bias, targets, weights, head, needs_grad)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None  # drop the reference: autograd then takes them without a copy
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None, None, None


weighted_nll = _WeightedNLL.apply


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    head: Head,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The fields of WeightedOutput and the gradients of hidden, weight and bias, None where not needed."""
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    exact = torch.promote_types(weight.dtype, torch.float32)  # sums over chunks would lose digits in bfloat16
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=exact) if needs_grad[2] and bias is not None else None
    log_probs = torch.empty(len(hidden), dtype=exact)
    is_top1 = torch.empty(len(hidden), dtype=torch.bool)
    weights = weights.to(log_probs.dtype)
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=log_probs.dtype)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        h, y, w = hidden[part], targets[part], weights[part]
        z = head.logits(h, weight, bias, out=buffer[: len(h)])
        top = z.amax(dim=-1, keepdim=True)
        z_y = z.gather(1, y[:, None])
        slope = None if head.softcap is None else (z / head.softcap).square_().neg_().add_(1)  # d capped / d logit
        z.sub_(top).exp_()
        total = z.sum(dim=-1, keepdim=True)
        log_probs[part] = (z_y - top - total.log())[:, 0]
        is_top1[part] = (z_y == top)[:, 0]
        if not any(needs_grad):
            continue
        z.mul_((w[:, None] / total) * head.scale)
        z.scatter_add_(1, y[:, None], -w[:, None] * head.scale)
        if slope is not None:
            z.mul_(slope)
        if grad_bias is not None:
            grad_bias.add_(z.sum(dim=0))
        z = z.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(z, weight, out=grad_hidden[part])
        if grad_weight is not None and exact == weight.dtype:
            grad_weight.addmm_(z.t(), h)
        elif grad_weight is not None:
            grad_weight.add_(torch.mm(z.t(), h))
    return -(weights * log_probs).sum(), log_probs, is_top1, (grad_hidden, grad_weight, grad_bias)


def add_weighted_head(model: PreTrainedModel) -> bool:
    """Make `model(..., labels=, loss_weights=)` return a WeightedOutput. Call it before wrapping the model.

    `labels` (rows, length) are -100 at tokens not to score; `loss_weights` (rows, length) are float32.

    Returns:
        False, without changing the model, unless its logits are a linear projection of the last hidden states, perhaps
        scaled and soft-capped. The check compares the logits of a few tokens with those of the model's own head.
    """
    head = _head_of(model)
    if not _agrees(model, head):
        return False
    original_forward = model.forward

    @functools.wraps(original_forward)
    def forward(self: Any, *args: Any, loss_weights: Tensor | None = None, **kwargs: Any) -> Any:
        if loss_weights is None:
            return original_forward(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        scored = labels != -100
        return _score(head, self.get_output_embeddings(), hidden, labels, loss_weights[:, 1:], scored)

    model.forward = types.MethodType(forward, model)
    return True


@torch.compiler.disable  # the number of scored positions differs in every batch, and each would be compiled again
def _score(head: Head, linear: nn.Linear, hidden: Tensor, labels: Tensor, weights: Tensor, scored: Tensor) -> Any:
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (linear.weight, linear.bias))
    nll, log_probs, is_top1 = weighted_nll(
        hidden[scored], weight, bias, labels[scored], weights[scored], head, torch.is_grad_enabled()
    )
    return WeightedOutput(
        weighted_nll=nll,
        log_probs=torch.zeros(scored.shape, dtype=log_probs.dtype).masked_scatter_(scored, log_probs),
        is_top1=torch.zeros(scored.shape, dtype=torch.bool).masked_scatter_(scored, is_top1),
    )


def _head_of(model: PreTrainedModel) -> Head:
    """The scale and the soft cap in the model's config, whose names differ by architecture."""
    config = model.config.get_text_config()
    multipliers = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scale = next((float(value) for value in multipliers if value is not None), 1.0)
    divisor = getattr(config, "logits_scaling", None)
    return Head(scale / divisor if divisor else scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _agrees(model: PreTrainedModel, head: Head) -> bool:
    """Whether `head` computes the model's own logits from its last hidden states."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    if type(linear) is not nn.Linear or getattr(config, "output_router_logits", None) is not None:
        return False  # TRL's head adds the auxiliary loss of a mixture of experts
    was_training = model.training
    model.eval()
    try:
        tokens = torch.arange(8)[None] % linear.out_features
        expected = model(input_ids=tokens, use_cache=False).logits[0].double()
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        logits = head.logits(hidden.to(linear.weight.dtype), linear.weight, linear.bias).double()
    except (AttributeError, TypeError):  # no backbone that returns its last hidden states
        return False
    finally:
        model.train(was_training)
    if logits.shape != expected.shape:
        return False
    return torch.allclose(expected, logits, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
