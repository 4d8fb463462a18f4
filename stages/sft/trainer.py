"""WITTrainer: TRL's SFTTrainer with a weight on every token of the loss.

    L_WIT = - sum_t w_t log p(x_t | x_<t) / #{t : w_t != 0},   w_t = lambda_p on prompts, lambda_r on completions

(Chatterjee et al., TACL 2025, section 3). Both sums run over one optimiser step: every micro-batch of the gradient
accumulation and every rank. The denominator is the number of predicted tokens of non-zero weight, not the sum
of the weights, so the loss at (0.5, 0.5) is half the loss at (1, 1).
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from stages.base import UserError
from stages.data.segments import weights_by_segment
from stages.data.tokenization import Preparer, prepare, stop_ids_of
from stages.library_options.option_models import RESERVED
from stages.sft.collator import BOUNDARIES, WeightedCollator
from stages.sft.head import add_weighted_head
from stages.sft.loss_metrics import LossMetrics
from stages.sft.mfu import model_flops, peak_flops
from stages.sft.packing import check_packing, pack, pack_shape
from stages.sft.row_filter import DatasetStats, check_rows, select
from stages.training import trainer_internals as internals
from stages.training.check import check_token_id

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where a forward pass works only after the model is sharded over the ranks."""


@dataclass
class WITConfig(SFTConfig):
    """SFTConfig with the weights of the WIT loss. The defaults are conventional instruction tuning."""

    prompt_loss_weight: float = field(default=0.0, metadata={"help": "lambda_p, the weight of prompt tokens."})
    completion_loss_weight: float = field(default=1.0, metadata={"help": "lambda_r, the weight of completion tokens."})
    system_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the words of system messages; prompt_loss_weight if None."}
    )
    template_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the chat template's own tokens; prompt_loss_weight if None."}
    )
    turns: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which assistant messages of `messages` are completion."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.segment_weights[:4]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"loss weights are {weights}; set numbers >= 0, not all of them 0")
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns is {self.turns!r}; set it to 'all' or 'last'")
        conflicts = {
            "completion_only_loss": self.completion_only_loss,
            "assistant_only_loss": self.assistant_only_loss,
            "packing_strategy": self.packing and self.packing_strategy != "bfd",
            "truncation_mode": self.truncation_mode != "keep_start",
            "average_tokens_across_devices": not self.average_tokens_across_devices,
            "dataset_kwargs": self.dataset_kwargs,
            "loss_type": self.loss_type != "nll",
            "label_smoothing_factor": self.label_smoothing_factor,
        }
        for name, conflict in conflicts.items():
            if conflict:
                raise ValueError(f"leave {name} out: {RESERVED['SFTConfig'][name]}")

    @property
    def segment_weights(self) -> list[float]:
        return weights_by_segment(
            self.prompt_loss_weight, self.completion_loss_weight, self.system_loss_weight, self.template_loss_weight
        )


class WITTrainer(SFTTrainer):
    """SFTTrainer that minimises the WIT loss.

    Logs `loss`, `prompt_loss`, `completion_loss`, `mean_token_accuracy`, `weighted_tokens/SEGMENT` (see LossMetrics),
    `tokens_per_second` and, on a GPU of known speed, `mfu`. Evaluation logs the losses, counts and speed with the
    prefix `eval_` and scores tokens of weight 0 too. Training does not, to save time: its `prompt_loss` covers only
    tokens with a weight and is absent at (0, 1).

    Data sets have rows of `prompt` and `completion` (text or messages), `messages`, `text`, `input_ids` and
    `loss_weights`, or rows prepared by `stages.data.tokenization.prepare`. Rows without a predicted token of non-zero
    weight are left out; `used` counts rows and tokens by data set.

    The figures of micro-batches stay on the device until the next log, checkpoint or end of training: reading one waits
    for all work that is queued there.

    Raises UserError if rows cannot be used, and where the figures are read if the loss of a step was not finite.
    """

    args: WITConfig

    def __init__(self, model: Any, args: WITConfig, train_dataset: Dataset, **options: Any) -> None:
        _check_arguments(model, args, options)
        self.used: dict[str, DatasetStats] = {}
        self._generation_config = getattr(model, "generation_config", None)
        # with padding_free, SFTTrainer would set its own collator, which does not truncate at max_length
        padding_free, args.padding_free = args.padding_free, False
        super().__init__(model, args=args, train_dataset=train_dataset, **options)
        args.padding_free = padding_free
        self.model_accepts_loss_kwargs = True  # compute_loss uses num_items_in_batch, whatever model.forward accepts
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        for name, stats in self.used.items():
            check_token_id(name, stats.largest_id, base.config.get_text_config().vocab_size)
        tokenizer: Any = self.processing_class
        uses_flash = "flash" in internals.attention_kernel(base)
        device, shape = self.accelerator.device, None
        if args.packing and args.torch_compile and args.max_length:
            shape = pack_shape(self.train_dataset, args.per_device_train_batch_size, args.max_length)
        self.data_collator = WeightedCollator(
            pad_token_id=tokenizer.pad_token_id,
            segment_weights=args.segment_weights,
            pad_to_multiple_of=int(args.pad_to_multiple_of) if args.pad_to_multiple_of else None,
            flatten=padding_free or (args.packing and uses_flash),
            boundaries=uses_flash,
            shape=shape,
        )
        self._uses_cpu_head = device.type == "cpu" and add_weighted_head(base)  # FSDP moves the model to its GPU later
        self.train_metrics, self._eval_metrics = LossMetrics(device), LossMetrics(device)
        self._packing_checked = not (args.packing or args.eval_packing or padding_free)
        if not self._packing_checked and self.accelerator.distributed_type not in _SHARDED:
            check_packing(base)
            self._packing_checked = True
        self._log_start: tuple[float, int] | None = None
        """Time and trained tokens at the first step since the last log."""
        self._eval_tokens: Tensor | int = 0
        self._micro_batches: list[tuple[int, float, list[list[int]], Tensor]] = []
        """Step, learning rate, data rows and figures of each micro-batch that `_read_figures` has not read yet."""
        self._attended = 0.0
        """Pairs of a query and a key that it attends to, in the steps since the last log."""
        self._peak_flops = peak_flops(device) or 0.0
        self._flops = model_flops(self.model) if self._peak_flops else None
        """FLOPs for a token and for a pair."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):  # type: ignore[no-untyped-def]
        if isinstance(dataset, IterableDataset):
            raise ValueError("WITTrainer counts the rows before training; give a Dataset, not an IterableDataset")
        if "seq_lengths" in dataset.column_names:  # packed by an earlier call
            return dataset
        if "segments" not in dataset.column_names:
            with args.main_process_first(desc="preparing rows"):
                preparer = Preparer(processing_class, args.max_length, args.turns)
                dataset = prepare(dataset, preparer, num_proc=args.dataset_num_proc)
        stop_ids = stop_ids_of(processing_class, self._generation_config)
        dataset, stats = select(dataset, args.segment_weights, stop_ids)
        self.used.setdefault(dataset_name, stats)
        check_rows(dataset_name, stats, args.max_length, args.completion_loss_weight)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            if args.max_length is None:
                raise ValueError("packing fills rows up to max_length; set max_length")
            dataset = pack(dataset, args.max_length)
        batch = args.per_device_train_batch_size if dataset_name == "train" else args.per_device_eval_batch_size
        return _pad_rows(dataset, batch * args.world_size) if args.world_size > 1 else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "segments", "factors", "row", "seq_lengths"]  # type: ignore[assignment]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the WIT loss of a micro-batch, - sum_t w_t log p(x_t | x_<t) / #{t : w_t != 0}.

        Replaces SFTTrainer.compute_loss and keeps its metrics.

        Args:
            return_outputs: also return the model's own outputs, with logits, from a second forward pass.
            num_items_in_batch: the denominator: labels other than -100 in the optimiser step, over all micro-batches
                and ranks. None in evaluation, where the denominator is the micro-batch's own count.
        """
        training = model.training
        rows, segments, weights = inputs.pop("rows"), inputs.pop("segments"), inputs.pop("loss_weights")
        forward = self._prepare_forward(model, inputs)
        labels = inputs["labels"] if training else _all_labels(inputs)

        if self._uses_cpu_head:
            outputs = model(**forward, labels=labels, loss_weights=weights)
            weighted_nll = outputs.weighted_nll
        else:
            outputs = model(**forward, labels=labels, fused_lm_head=True)
            weighted_nll = -(outputs.log_probs * weights[:, 1:]).sum()
        count = (weights[:, 1:] != 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = weighted_nll / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None:  # DDP averages the gradients over the ranks
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:  # of mixtures of experts: the mean over the micro-batches of a step
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        (self.train_metrics if training else self._eval_metrics).update(
            segments[:, 1:], weights[:, 1:], labels[:, 1:] != -100, outputs.log_probs.detach(), outputs.is_top1
        )
        if training:
            self._keep_figures(inputs, outputs, loss.detach(), rows)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**forward)

    def _prepare_forward(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Update the clock and the counter of tokens per second; return the model's arguments without the labels."""
        if model.training and self._log_start is None:
            self._log_start = (time.perf_counter(), internals.trained_tokens(self))
        if not model.training:
            self._eval_tokens = inputs["attention_mask"].sum() + self._eval_tokens
        forward = {"input_ids": inputs["input_ids"], "use_cache": False}
        forward |= {name: inputs[name] for name in BOUNDARIES if name in inputs}
        if "position_ids" not in inputs:
            forward["attention_mask"] = inputs["attention_mask"]
        else:  # without the mask, which would let packed examples attend to each other
            forward["position_ids"] = inputs["position_ids"]
            if not self._packing_checked:
                check_packing(model)
                self._packing_checked = True
        if self.aux_loss_enabled:
            forward["output_router_logits"] = True
        return forward

    def _keep_figures(self, inputs: dict[str, Any], outputs: Any, loss: Tensor, rows: list[list[int]]) -> None:
        """Keep the figures of a micro-batch on the device. The CPU head computes no entropy, to save time."""
        mask, labels = inputs["attention_mask"], inputs["labels"][:, 1:]
        positions = inputs["position_ids"] if "position_ids" in inputs else mask.cumsum(1) - 1
        figures = [
            torch.isfinite(loss),
            mask.sum(),
            ((positions + 1) * mask).sum(),
            (labels != -100).sum(),
            torch.zeros_like(loss) if self._uses_cpu_head else outputs.entropy.detach().sum(),
            outputs.aux_loss.detach() if self.aux_loss_enabled else torch.zeros_like(loss),
        ]
        row = torch.stack([figure.float() for figure in figures])
        self._micro_batches.append((self.state.global_step + 1, internals.learning_rate(self), rows, row))

    def _read_figures(self) -> None:
        """Add the figures of the micro-batches since the last call, of all ranks, to the metrics that SFTTrainer.log
        averages. Waits for the device once.

        Raises UserError for the first micro-batch whose loss is not finite.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches:
            return
        figures = self.accelerator.gather(torch.stack([figures for *_, figures in micro_batches])[None]).cpu()
        finite, tokens, attended, scored, entropy, aux_loss = figures.unbind(2)  # each (ranks, micro-batches)
        for (step, rate, rows, _), is_finite in zip(micro_batches, finite.unbind(1), strict=True):
            if not is_finite.all():
                own = rows if not is_finite[self.accelerator.process_index] else []
                numbers = ", ".join(str(number) for row in gather_object(own) for number in row)
                raise UserError(
                    f"step {step}: the loss is not finite at learning rate {rate:.3g};"
                    f" lower train.learning_rate, or check the data rows: {numbers}"
                )
        metrics = internals.metric_lists(self, "train")
        if not self._uses_cpu_head:
            metrics["entropy"] += (entropy.sum(0) / scored.sum(0).clamp(min=1)).tolist()
        if self.aux_loss_enabled:
            metrics["aux_loss"] += aux_loss.mean(0).tolist()
        internals.add_trained_tokens(self, int(tokens.sum(dtype=torch.float64)) // self.get_tp_size())
        self._attended += float(attended.sum(dtype=torch.float64)) / self.get_tp_size()
        metrics["num_tokens"] = [internals.trained_tokens(self)]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as SFTTrainer does, with metrics reset."""
        self.train_metrics.sums.zero_()
        self._log_start, self._micro_batches, self._attended = None, [], 0.0
        result = super().train(*args, **kwargs)
        self._read_figures()
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as SFTTrainer does, but no weights after a loss that is not finite."""
        self._read_figures()
        super().save_model(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as SFTTrainer does, but average each metric over all tokens, not over batches."""
        start, self._eval_tokens = time.perf_counter(), 0
        self._eval_metrics = LossMetrics(self.accelerator.device)
        output = super().evaluation_loop(*args, **kwargs)
        tokens = int(self._sum_over_ranks(torch.as_tensor(self._eval_tokens)))
        metrics = self._eval_metrics.compute_and_reset(self._sum_over_ranks)
        seconds = time.perf_counter() - start
        metrics["tokens_per_second"] = tokens / seconds
        if self._log_start is not None:  # time spent evaluating between two logs is not training time
            self._log_start = (self._log_start[0] + seconds, self._log_start[1])
        prefix = kwargs.get("metric_key_prefix", "eval")
        prefixed = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as SFTTrainer does, with the metrics of the training steps since the last log."""
        if "loss" in logs:
            self._read_figures()
            metrics = self.train_metrics.compute_and_reset(self._sum_over_ranks)
            del metrics["loss"]  # keep Trainer's own, the mean over the steps
            logs |= metrics
            if self._log_start is not None:
                start, tokens_before = self._log_start
                seconds, tokens = time.perf_counter() - start, internals.trained_tokens(self) - tokens_before
                logs["tokens_per_second"] = tokens / seconds
                if self._flops:
                    flops = self._flops[0] * tokens + self._flops[1] * self._attended
                    logs["mfu"] = flops / (seconds * self._peak_flops * self.accelerator.num_processes)
                self._log_start = None
            self._attended = 0.0
        super().log(logs, start_time)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums.cpu()
        return self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()


def _check_arguments(model: Any, args: WITConfig, options: dict[str, Any]) -> None:
    """Raise ValueError for arguments of SFTTrainer that the weights do not allow."""
    for name in ("formatting_func", "compute_loss_func", "data_collator"):
        if options.get(name):
            raise ValueError(
                f"WITTrainer prepares and collates the rows and computes the loss itself; leave {name} out"
            )
    if not isinstance(args, WITConfig):
        raise ValueError(f"args is a {type(args).__name__}, which has no weights; give a WITConfig")
    if isinstance(options.get("eval_dataset"), dict) and "train" in options["eval_dataset"]:
        raise ValueError("'train' is the name of the training data; give the evaluation data set another name")
    adapter = options.get("peft_config") or (model.active_peft_config if isinstance(model, PeftModel) else None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError("prompt learning adds tokens that have no weight; use LoRA or another kind of adapter")


def _all_labels(inputs: dict[str, Any]) -> Tensor:
    """Labels of all predicted tokens, including those of weight 0."""
    is_token = inputs["attention_mask"] == 1
    is_first = torch.zeros_like(is_token)
    is_first[:, 0] = True
    if "position_ids" in inputs:
        is_first |= inputs["position_ids"] == 0
    return inputs["input_ids"].masked_fill(~is_token | is_first, -100)


def _pad_rows(dataset: Dataset, divisor: int) -> Dataset:
    """Append rows without weight up to a multiple of `divisor`; else a rank would repeat rows in its last batch."""
    missing = -len(dataset) % divisor
    if not missing:
        return dataset
    packed = "seq_lengths" in dataset.column_names
    filler: dict[str, Any] = {"input_ids": [0], "segments": [0], "factors": [0.0], "row": [0] if packed else 0}
    filler |= {"seq_lengths": [1], "cut": 0, "merged": 0, "unwritten": 0, "problem": ""}
    rows = [{name: filler[name] for name in dataset.column_names}] * missing
    return concatenate_datasets([dataset, Dataset.from_list(rows, features=dataset.features)])
