"""Run a `dpo` stage: preference pairs -> TRL's DPOTrainer -> a published model.

The reference is the model that training starts from. No `ref_model` is passed, so TRL chooses it: without LoRA, it
loads the same folder a second time (or, with `precompute_ref_log_probs`, uses the model before training); with LoRA, it
switches the new adapter off, or to a copy of its start (`with_reference`). The adapter of an earlier SFT
stage is merged into its published model, so after SFT the reference is the SFT model, not the recipe's base model.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from stages.base import Context
from stages.dpo.config import DPOStage
from stages.dpo.pairs import load_pairs
from stages.models.tokenizer import load_step_tokenizer, load_stop_ids
from stages.records.metrics import Metrics
from stages.training.check import check_token_id
from stages.training.loop import arguments, train
from stages.training.model_io import load_model, with_reference
from stages.training.trackers import TrackedFields, tracked_fields

LOGGED = {
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
}
"""Metric -> the figure in the last log of a step."""


@dataclass
class Arguments(TrackedFields, DPOConfig):
    """DPOConfig with further fields for trackers."""


class PairTrainer(DPOTrainer):
    """DPOTrainer for pairs that `load_pairs` has tokenised."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def run(context: Context) -> Metrics:
    """Train context.inputs["model"] on the `train` pairs; measure the loss on `eval` if there is one."""
    stage: DPOStage = context.config
    model_path = context.inputs["model"].path
    fields = stage.train.model_dump()
    context.progress(0, 1, "preparing pairs")
    splits: list[str] = [name for name in ("train", "eval") if name in context.inputs]
    tokenizer = load_step_tokenizer(context)
    stop_ids = load_stop_ids(model_path, tokenizer, stage.trust_remote_code)
    pairs = {name: load_pairs(context, name, tokenizer, stop_ids) for name in splits}
    context.progress(0, 1, "loading the model")
    model = load_model(
        model_path,
        stage.seed,
        fields.get("model_init_kwargs"),  # stays in the fields: TRL loads the reference with it
        quantization=stage.quantization,
        trust_remote_code=stage.trust_remote_code,
    )
    embeddings: Any = model.get_input_embeddings()
    for name in splits:
        check_token_id(name, pairs[name].stats.largest_id, embeddings.num_embeddings)
    trainer = PairTrainer(
        **with_reference(model, stage.lora),
        args=Arguments(
            **tracked_fields(context) | arguments(context, fields), trust_remote_code=stage.trust_remote_code
        ),
        train_dataset=pairs["train"].dataset,
        eval_dataset=pairs["eval"].dataset if "eval" in pairs else None,
        processing_class=tokenizer,
    )
    return train(trainer, context, pairs, {}, LOGGED)
