"""What a training and an evaluation say of themselves: losses and counts by segment, exact over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.data.segments import TARGET_SEGMENTS, Segment

_NLL, _SCORED, _WEIGHTED_NLL, _WEIGHTED, _CORRECT = range(5)


class Tally:
    """Sums over tokens by Segment, float64, shape (segments, 5); turned into figures when they are logged."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(Segment), 5, dtype=torch.float64)

    def add(self, segments: Tensor, weights: Tensor, scored: Tensor, log_probs: Tensor, is_top1: Tensor) -> None:
        """A batch's tokens; all of one shape: their Segment, weight, whether they were scored (those of weight 0 may
        or may not be), log-likelihood, and whether they are the likeliest token."""
        segments, weights, log_probs, is_top1 = (x[scored].cpu() for x in (segments, weights, log_probs, is_top1))
        nll, weights = -log_probs.double(), weights.double()
        weighs = (weights != 0).double()
        columns = [nll, torch.ones_like(nll), weights * nll, weighs, weighs * is_top1]
        self.sums.index_add_(0, segments, torch.stack(columns, dim=1))

    def figures(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures since the last call, `add_up` summing a tensor over all ranks; those of no token are left out.

        `loss`: the WIT loss; `prompt_loss` and `completion_loss`: mean negative log-likelihood per scored token, not
        weighted, of what the model is given (prompt, system, template) and of what it shall answer;
        `mean_token_accuracy`: over tokens of non-zero weight; `weighted_tokens/SEGMENT`: how many those are.
        """
        sums = add_up(self.sums.clone())
        self.sums.zero_()
        weighted = float(sums[:, _WEIGHTED].sum())
        found = {"loss": float(sums[:, _WEIGHTED_NLL].sum()) / max(weighted, 1)}
        given = [segment for segment in Segment if segment not in TARGET_SEGMENTS]
        for name, kinds in (("prompt_loss", given), ("completion_loss", list(TARGET_SEGMENTS))):
            if count := float(sums[kinds, _SCORED].sum()):
                found[name] = float(sums[kinds, _NLL].sum()) / count
        found["mean_token_accuracy"] = float(sums[:, _CORRECT].sum()) / max(weighted, 1)
        counts = {segment.name.lower(): int(sums[segment, _WEIGHTED]) for segment in Segment}
        return found | {f"weighted_tokens/{name}": count for name, count in counts.items() if count}
