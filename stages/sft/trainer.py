"""WITTrainer: TRL's SFTTrainer with a weight on every token of the loss.

    L_WIT = - sum_t w_t log p(x_t | x_<t) / #{t : w_t != 0},   w_t = lambda_p on prompts, lambda_r on completions

(Chatterjee et al., TACL 2025, section 3). Both sums run over the whole optimiser step: every micro-batch of the
gradient accumulation and every rank. The denominator counts predicted tokens of non-zero weight; it is not the sum of
the weights, so (0.5, 0.5) has half the loss of (1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from stages.base import BadInput
from stages.sft.data import WeightedCollator, prepare


@dataclass
class WITConfig(SFTConfig):
    """SFTConfig with the two weights of the WIT loss. The defaults are conventional instruction tuning."""

    prompt_loss_weight: float = field(default=0.0, metadata={"help": "lambda_p, the weight of prompt tokens."})
    completion_loss_weight: float = field(default=1.0, metadata={"help": "lambda_r, the weight of completion tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.prompt_loss_weight, self.completion_loss_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"prompt_loss_weight and completion_loss_weight are numbers >= 0, not both 0: {weights}")
        for name in ("packing", "padding_free", "assistant_only_loss"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported with weighted tokens; leave it off")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError("the WIT loss replaces loss_type and label_smoothing_factor; leave them at their defaults")


class WITTrainer(SFTTrainer):
    """SFTTrainer that minimises the WIT loss.

    Takes what SFTTrainer takes, with data sets of `prompt` and `completion` (text or messages) or of `text`, and
    `args` a WITConfig. Rows with no predicted token of non-zero weight are left out of training.
    """

    args: WITConfig

    def __init__(self, model: Any, args: WITConfig, train_dataset: Dataset, **options: Any) -> None:
        if options.get("formatting_func") or options.get("compute_loss_func") or options.get("data_collator"):
            raise ValueError(
                "WITTrainer prepares, collates and weighs by itself; leave out formatting_func,"
                " compute_loss_func and data_collator"
            )
        super().__init__(model, args=args, train_dataset=train_dataset, **options)
        self.data_collator = WeightedCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            prompt_weight=args.prompt_loss_weight,
            completion_weight=args.completion_loss_weight,
            pad_to_multiple_of=int(args.pad_to_multiple_of) if args.pad_to_multiple_of else None,
        )

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):  # type: ignore[no-untyped-def]
        prepared = prepare(dataset, processing_class, args.max_length, num_proc=args.dataset_num_proc)
        by_segment = (args.prompt_loss_weight, args.completion_loss_weight)
        kept = prepared.filter(lambda row: any(by_segment[segment] for segment in row["segments"][1:]))
        if not len(kept):
            raise BadInput(
                f"no row of the {dataset_name} data has a token to learn: all weigh 0 or lie beyond max_length"
                f" {args.max_length}; raise max_length or the weights"
            )
        return kept.shuffle(seed=args.seed) if args.shuffle_dataset else kept

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "segments"]  # type: ignore[assignment]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The WIT loss of a batch, by SFTTrainer's own sum over log-probabilities that carry their weights.

        `num_items_in_batch` is the denominator: the labels that are not -100 over the whole optimiser step. In
        evaluation it is None, and the batch's own count is taken.
        """
        weights = inputs.pop("loss_weights")[:, 1:]  # log_probs[:, t] is of token t + 1

        def weighted(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if not kwargs.get("fused_lm_head"):  # a second forward, for the logits alone
                return outputs
            outputs.log_probs = outputs.log_probs * weights
            if not model.training:
                self._evaluated.append(torch.stack([-outputs.log_probs.sum(), outputs.label_mask.sum()]))
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """SFTTrainer's loop, with the loss summed over all tokens and divided once; the mean of the batches' means
        would depend on how rows fell into batches."""
        self._evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(torch.stack(self._evaluated).sum(dim=0), reduction="sum").tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        return output._replace(metrics={**(output.metrics or {}), f"{prefix}_loss": total / max(count, 1)})
