"""WITTrainer: TRL's SFTTrainer with a weight on every token of the loss.

    L_WIT = - sum_t w_t log p(x_t | x_<t) / #{t : w_t != 0},   w_t = lambda_p on prompts, lambda_r on completions

(Chatterjee et al., TACL 2025, section 3). Both sums run over the whole optimiser step: every micro-batch of the
gradient accumulation and every rank. The denominator counts predicted tokens of non-zero weight; it is not the sum of
the weights, so (0.5, 0.5) has half the loss of (1, 1).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import DistributedType
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from stages.base import UserError
from stages.data.segments import TARGET_SEGMENTS, weights_by_segment
from stages.data.tokenization import prepare
from stages.sft.collator import WeightedCollator
from stages.sft.head import add_weighted_head
from stages.sft.loss_metrics import Tally
from stages.sft.packing import keeps_apart, pack
from stages.sft.row_filter import Used, select

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where the model can be asked something only once it is spread over the ranks."""


@dataclass
class WITConfig(SFTConfig):
    """SFTConfig with the weights of the WIT loss. The defaults are conventional instruction tuning."""

    prompt_loss_weight: float = field(default=0.0, metadata={"help": "lambda_p, the weight of prompt tokens."})
    completion_loss_weight: float = field(default=1.0, metadata={"help": "lambda_r, the weight of completion tokens."})
    system_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the words of system messages; prompt_loss_weight if None."}
    )
    template_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of what the chat template writes; prompt_loss_weight if None."}
    )
    turns: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which assistant messages of `messages` are completion."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.table) or not any(self.table[:4]):
            raise ValueError(f"loss weights are numbers >= 0, not all of them 0; found {self.table[:4]}")
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns is 'all' or 'last', not {self.turns!r}")
        if self.assistant_only_loss or self.completion_only_loss:
            raise ValueError(
                "the loss weights say what is learnt; leave assistant_only_loss and completion_only_loss out"
            )
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(f"packing_strategy {self.packing_strategy!r} cuts examples in pieces; use 'bfd'")
        if self.truncation_mode != "keep_start":
            raise ValueError("rows are cut on the right; leave truncation_mode at 'keep_start'")
        if not self.average_tokens_across_devices:
            raise ValueError("the WIT loss counts tokens over all ranks; leave average_tokens_across_devices on")
        if self.dataset_kwargs:
            raise ValueError("rows are prepared for their weights; leave dataset_kwargs out")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError("the WIT loss replaces loss_type and label_smoothing_factor; leave them at their defaults")

    @property
    def table(self) -> list[float]:
        """The weight of each Segment, by its value."""
        return weights_by_segment(
            self.prompt_loss_weight, self.completion_loss_weight, self.system_loss_weight, self.template_loss_weight
        )


class WITTrainer(SFTTrainer):
    """SFTTrainer that minimises the WIT loss.

    Takes what SFTTrainer takes, with data sets of `prompt` and `completion` (text or messages), `messages`, `text`,
    `input_ids` and `loss_weights`, or rows of `stages.sft.data.prepare`; `args` is a WITConfig. Rows with no
    predicted token of non-zero weight are left out; `used` says for each data set what became of its rows.

    Logs `loss`, `prompt_loss`, `completion_loss`, `mean_token_accuracy`, `weighted_tokens/SEGMENT` (see Tally) and
    `tokens_per_second`; in evaluation the same with `eval_`, where tokens of weight 0 are scored too. In training
    they are not, for that costs time: there `prompt_loss` is of the tokens that weigh, and at (0, 1) there is none.

    Raises UserError for rows that cannot be used, and when the loss is no finite number.
    """

    args: WITConfig

    def __init__(self, model: Any, args: WITConfig, train_dataset: Dataset, **options: Any) -> None:
        for name in ("formatting_func", "compute_loss_func", "data_collator"):
            if options.get(name):
                raise ValueError(f"WITTrainer prepares, collates and weighs by itself; leave {name} out")
        if not isinstance(args, WITConfig):
            raise ValueError(f"args is a WITConfig, which has the weights; found {type(args).__name__}")
        if isinstance(options.get("eval_dataset"), dict) and "train" in options["eval_dataset"]:
            raise ValueError("'train' is the name of the training data; give the evaluation data set another name")
        adapter = options.get("peft_config") or getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError("prompt learning adds tokens that have no weight; use LoRA or another kind of adapter")
        self.used: dict[str, Used] = {}
        padding_free, args.padding_free = args.padding_free, False  # TRL's own collator would not cut at max_length
        super().__init__(model, args=args, train_dataset=train_dataset, **options)
        args.padding_free = padding_free
        self.model_accepts_loss_kwargs = True  # compute_loss takes num_items_in_batch, whatever model.forward does
        self.data_collator = WeightedCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            table=args.table,
            pad_to_multiple_of=int(args.pad_to_multiple_of) if args.pad_to_multiple_of else None,
            flatten=padding_free or (args.packing and self._takes_lengths()),
        )
        on_cpu = self.accelerator.device.type == "cpu"  # under FSDP the model itself gets to its GPU later
        self._chunked = on_cpu and add_weighted_head(self._base_model())
        self._tallies = {"train": Tally(), "eval": Tally()}
        self._kept_apart = not (args.packing or padding_free)
        if not self._kept_apart and self.accelerator.distributed_type not in _SHARDED:
            self._kept_apart = keeps_apart(self._base_model())
        self._check_ids()
        self._since: tuple[float, int] | None = None
        self._eval_tokens = 0

    def _check_ids(self) -> None:
        """Raise UserError where rows that came as tokens have one that the model does not know."""
        known = self._base_model().get_input_embeddings().num_embeddings
        for name, used in self.used.items():
            if used.largest_id >= known:
                raise UserError(
                    f"the {name} data have a token id {used.largest_id}, but the model knows {known} tokens, 0 to"
                    f" {known - 1}; prepare the rows with the model's own tokenizer"
                )

    @property
    def train_sums(self) -> Tensor:
        """What the next log's figures are made of: Tally.sums, which a checkpoint has to keep."""
        return self._tallies["train"].sums

    def _base_model(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _takes_lengths(self) -> bool:
        """Whether the attention kernel takes examples of different length one after the other."""
        return "flash" in str(self._base_model().config.get_text_config()._attn_implementation)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):  # type: ignore[no-untyped-def]
        if isinstance(dataset, IterableDataset):
            raise ValueError("WITTrainer counts its rows beforehand; give a Dataset, not an IterableDataset")
        if "seq_lengths" in dataset.column_names:  # packed before, by this method
            return dataset
        if "segments" not in dataset.column_names:
            with args.main_process_first(desc="preparing rows"):
                processes = args.dataset_num_proc
                dataset = prepare(dataset, processing_class, args.max_length, args.turns, num_proc=processes)
        kept, used = select(dataset, args.table)
        self.used.setdefault(dataset_name, used)
        learnt = any(segment.name.lower() in used.weighted for segment in TARGET_SEGMENTS)
        if used.rows_without_completion and args.completion_loss_weight and not learnt:
            raise UserError(
                f"every row of the {dataset_name} data lost its whole completion at max_length {args.max_length};"
                " raise max_length"
            )
        if not len(kept):
            raise UserError(f"no row of the {dataset_name} data has a token that weighs; raise the weights")
        if args.max_length and used.longest > args.max_length:
            raise UserError(
                f"the {dataset_name} data were prepared with rows of up to {used.longest} tokens, more than max_length"
                f" {args.max_length}; prepare them anew, or raise max_length"
            )
        if args.shuffle_dataset:
            kept = kept.shuffle(seed=args.seed)
        if packing:
            if args.max_length is None:
                raise ValueError("packing fills rows up to max_length; set max_length")
            kept = pack(kept, args.max_length)
        batch = args.per_device_train_batch_size if dataset_name == "train" else args.per_device_eval_batch_size
        return _divisible(kept, batch * args.world_size) if args.world_size > 1 else kept

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "segments", "factors", "row", "seq_lengths"]  # type: ignore[assignment]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The WIT loss of a batch, by SFTTrainer's own sum over log-probabilities that carry their weights.

        `num_items_in_batch` is the denominator: the labels that are not -100 over the whole optimiser step. In
        evaluation it is None, and the batch's own count is taken.
        """
        training = model.training
        rows, segments, weights = inputs.pop("rows"), inputs.pop("segments"), inputs.pop("loss_weights")
        if "position_ids" in inputs and not self._kept_apart:
            self._kept_apart = keeps_apart(model)
        if training and self._since is None:
            self._since = (time.perf_counter(), self._total_train_tokens)
        if not training:
            self._eval_tokens += int(inputs["attention_mask"].sum())

        def weighted(**kwargs: Any) -> Any:
            if "position_ids" in kwargs:  # they say where examples begin; a mask beside them would be taken for all
                kwargs.pop("attention_mask")
            if not kwargs.pop("fused_lm_head", False):  # a second forward, for the logits alone
                return model(**kwargs)
            if not training:
                kwargs["labels"] = self._all_labels(inputs)
            outputs, log_probs, is_top1 = self._scored(model, kwargs, weights)
            scored = kwargs["labels"][:, 1:] != -100
            self._tallies["train" if training else "eval"].add(
                segments[:, 1:], weights[:, 1:], scored, log_probs, is_top1
            )
            return outputs

        result = super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)
        mode = self._metrics["train" if training else "eval"]
        mode.pop("mean_token_accuracy", None)  # the tally has it exactly
        if self._chunked:
            mode.pop("entropy", None)  # it would cost a further pass over the logits
        if training and not bool(torch.isfinite(result[0] if return_outputs else result)):
            raise UserError(self._diverged(rows))
        return result

    def _scored(
        self, model: Any, kwargs: dict[str, Any], weights: Tensor
    ) -> tuple[FusedCausalLMOutput, Tensor, Tensor]:
        """TRL's output, with weights on its log-probabilities; beside it those without weights, and which are top."""
        counted = (weights != 0)[:, 1:]
        if self._chunked:
            made = model(**kwargs, loss_weights=weights)
            none = torch.zeros(1)
            outputs = FusedCausalLMOutput(log_probs=-made.weighted_nll[None], entropy=none, is_top1=none)
            log_probs, is_top1 = made.log_probs, made.is_top1
        else:
            outputs = model(**kwargs, fused_lm_head=True)
            log_probs, is_top1 = outputs.log_probs.detach(), outputs.is_top1
            outputs.log_probs = outputs.log_probs * weights[:, 1:]
            outputs.entropy = outputs.entropy * counted
        outputs.label_mask = counted
        return outputs, log_probs, is_top1

    def _all_labels(self, inputs: dict[str, Any]) -> Tensor:
        """The labels of all tokens that are predicted, whatever they weigh."""
        real = inputs["attention_mask"] == 1
        first = torch.zeros_like(real)
        first[:, 0] = True
        if "position_ids" in inputs:
            first |= inputs["position_ids"] == 0
        return inputs["input_ids"].masked_fill(~real | first, -100)

    def _diverged(self, rows: list[list[int]]) -> str:
        numbers = ", ".join(str(number) for batch in rows for number in batch)
        return (
            f"step {self.state.global_step + 1}: the loss is no finite number at learning rate"
            f" {self._get_learning_rate():.3g}; lower train.learning_rate, or look at the batch's data rows: {numbers}"
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's, with figures that begin anew."""
        self.train_sums.zero_()
        self._since = None
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """SFTTrainer's loop, with every figure summed over all tokens and divided once; the mean of the batches'
        means would depend on how rows fell into batches."""
        began, self._eval_tokens = time.perf_counter(), 0
        self._tallies["eval"] = Tally()
        output = super().evaluation_loop(*args, **kwargs)
        tokens = int(self._over_ranks(torch.tensor(self._eval_tokens)))
        self._metrics["eval"].clear()
        figures = self._tallies["eval"].figures(self._over_ranks)
        seconds = time.perf_counter() - began
        figures["tokens_per_second"] = tokens / seconds
        if self._since is not None:  # an evaluation between two logs is no training
            self._since = (self._since[0] + seconds, self._since[1])
        prefix = kwargs.get("metric_key_prefix", "eval")
        named = {f"{prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """SFTTrainer's log, with the figures of the training since the last."""
        if "loss" in logs:
            figures = self._tallies["train"].figures(self._over_ranks)
            del figures["loss"]  # Trainer's own, which is the mean over the steps
            logs |= figures
            if self._since is not None:
                began, tokens = self._since
                logs["tokens_per_second"] = (self._total_train_tokens - tokens) / (time.perf_counter() - began)
                self._since = None
        super().log(logs, start_time)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()


def _divisible(dataset: Dataset, parts: int) -> Dataset:
    """`dataset` with rows that weigh nothing at its end, so that no rank gets a row twice to fill its last batch."""
    missing = -len(dataset) % parts
    if not missing:
        return dataset
    filler: dict[str, Any] = {"input_ids": [0], "segments": [0], "factors": [0.0], "row": 0, "seq_lengths": [1]}
    filler |= {"row": [0]} if "seq_lengths" in dataset.column_names else {}
    filler |= {"cut": 0, "merged": 0, "problem": ""}
    rows = [{name: filler[name] for name in dataset.column_names}] * missing
    return concatenate_datasets([dataset, Dataset.from_list(rows, features=dataset.features)])
