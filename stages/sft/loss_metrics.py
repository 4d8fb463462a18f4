"""Losses and token counts by segment, exact over batches and ranks, for the logs of training and evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor

from stages.data.segments import TARGET_SEGMENTS, Segment

_NLL, _SCORED, _WEIGHTED_NLL, _WEIGHTED, _CORRECT = range(5)


class LossMetrics:
    """Sums over tokens by Segment, float64, shape (segments, 5), from which the logged metrics are computed.

    On a GPU they stay there until `compute_and_reset`: copying a batch to the CPU would wait for its forward pass.
    """

    def __init__(self, device: torch.device) -> None:
        device = device if device.type == "cuda" else torch.device("cpu")  # others may have no float64
        self.sums = torch.zeros(len(Segment), 5, dtype=torch.float64, device=device)

    def update(self, segments: Tensor, weights: Tensor, scored: Tensor, log_probs: Tensor, is_top1: Tensor) -> None:
        """Add the tokens of a batch that are `scored` (bool), with weight 0 or not. All tensors have the same shape."""
        tensors = (x.to(self.sums.device).flatten() for x in (segments, weights, scored, log_probs, is_top1))
        segments, weights, scored, log_probs, is_top1 = tensors
        nll, weights = -log_probs.double(), weights.double()
        is_weighted = (weights != 0).double()
        columns = torch.stack([nll, torch.ones_like(nll), weights * nll, is_weighted, is_weighted * is_top1], dim=1)
        self.sums.index_add_(0, segments, columns.masked_fill(~scored[:, None], 0))

    def compute_and_reset(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Compute the metrics since the last call.

        Returns:
            `loss`: the WIT loss; `prompt_loss` and `completion_loss`: unweighted mean negative log-likelihood of the
            scored tokens of the input (prompt, system, template) and of the target, absent without such tokens;
            `mean_token_accuracy`: over tokens of non-zero weight; `weighted_tokens/SEGMENT`: the number of those.
        """
        sums = sum_over_ranks(self.sums.clone())
        self.sums.zero_()
        weighted = float(sums[:, _WEIGHTED].sum())
        metrics = {"loss": float(sums[:, _WEIGHTED_NLL].sum()) / max(weighted, 1)}
        inputs = [segment for segment in Segment if segment not in TARGET_SEGMENTS]
        for name, segments in (("prompt_loss", inputs), ("completion_loss", list(TARGET_SEGMENTS))):
            if count := float(sums[segments, _SCORED].sum()):
                metrics[name] = float(sums[segments, _NLL].sum()) / count
        metrics["mean_token_accuracy"] = float(sums[:, _CORRECT].sum()) / max(weighted, 1)
        counts = {segment.name.lower(): int(sums[segment, _WEIGHTED]) for segment in Segment}
        return metrics | {f"weighted_tokens/{name}": count for name, count in counts.items() if count}
