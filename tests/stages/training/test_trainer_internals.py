"""The private attributes of transformers' and TRL's trainers still mean what this project needs them for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stages.dpo.stage import PairTrainer
from stages.system.library_versions import require_version
from stages.training import trainer_internals as internals
from tests.tiny import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"{n}: ", "completion": " Four.", "chosen": " Four.", "rejected": " Five."} for n in range(6)]
TOKENS = len("0:  Four.") + 1
"""Of one row, with its <end>."""
LOGGED = {
    "sft": {"entropy", "mean_token_accuracy", "num_tokens"},
    "dpo": {"entropy", "mean_token_accuracy", "num_tokens", "rewards/chosen", "logps/chosen"},
}


class Recorder(TrainerCallback):
    """Reads the sums after each step and each log, and the learning rate before each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.sums: list[dict[str, Any]] = []
        self.learning_rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rates.append(internals.learning_rate(self.trainer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums.append(internals.read_sums(self.trainer))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums.append(internals.read_sums(self.trainer))


def train(folder: Path, kind: str, *callbacks: TrainerCallback, **fields: Any) -> tuple[Any, float]:
    """A trainer after three steps of two rows with a log after the second, and the mean loss that it returns."""
    trainer_class, config = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 0.5}
    common |= {"report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    common["activation_checkpointing"] = False
    columns = ("prompt", "completion") if kind == "sft" else ("prompt", "chosen", "rejected")
    trainer = trainer_class(
        model=tiny_model(),
        args=config(output_dir=str(folder), **common | fields),
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in ROWS]),
        processing_class=byte_tokenizer(),
        callbacks=list(callbacks),
        **({} if kind == "sft" else {"ref_model": tiny_model()}),
    )
    for callback in callbacks:
        callback.trainer = trainer  # type: ignore[attr-defined]
    return trainer, trainer.train().training_loss


@pytest.mark.parametrize("kind", LOGGED)
def test_sums_behind_the_next_log(tmp_path: Path, kind: str) -> None:
    recorder = Recorder()
    trainer, train_loss = train(tmp_path, kind, recorder)
    (log,) = [row for row in trainer.state.log_history if "loss" in row]
    first, second, logged, last = recorder.sums[:4]
    assert second["loss"] / 2 == pytest.approx(log["loss"])
    assert (first["total_loss"], first["last_logged"]) == (0, 0)
    assert logged["total_loss"] + logged["loss"] == pytest.approx(second["loss"])
    assert logged["last_logged"] == 2
    assert (logged["total_loss"] + last["loss"]) / 3 == pytest.approx(train_loss)
    assert first["loss"] < second["loss"]
    assert first["metrics"].keys() >= LOGGED[kind]
    assert len(second["metrics"]["entropy"]) == 2
    assert last["metrics"]["entropy"] != second["metrics"]["entropy"]
    assert len(last["metrics"]["entropy"]) == 1
    assert internals.metric_lists(trainer, "eval") == {}


@pytest.mark.parametrize("kind", LOGGED)
def test_trained_tokens(tmp_path: Path, kind: str) -> None:
    trainer, _ = train(tmp_path, kind)
    tokens = TOKENS * 6 * (1 if kind == "sft" else 2)
    assert internals.trained_tokens(trainer) == tokens
    internals.add_trained_tokens(trainer, 5)
    assert internals.trained_tokens(trainer) == tokens + 5


def test_restored_sums_enter_the_log_and_the_mean_loss(tmp_path: Path) -> None:
    class Restore(Recorder):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sums = {"loss": 6.0, "total_loss": 30.0, "last_logged": 0, "tokens": 100, "metrics": {"entropy": [9.0]}}
            internals.restore_sums(self.trainer, sums, torch.device("cpu"))

    (plain, plain_loss), (restored, restored_loss) = train(tmp_path, "sft"), train(tmp_path, "sft", Restore())
    before, after = plain.state.log_history[0], restored.state.log_history[0]
    assert after["loss"] == pytest.approx(before["loss"] + 6 / 2)
    assert restored_loss == pytest.approx(plain_loss + 36 / 3)
    assert after["num_tokens"] == before["num_tokens"] + 100
    assert after["entropy"] == pytest.approx((9 + 2 * before["entropy"]) / 3)


def test_restored_sums_count_all_steps_of_a_resumed_training(tmp_path: Path) -> None:
    """transformers divides the total loss by the steps of the last attempt, unless `_initial_global_step` is reset."""

    class Restore(Recorder):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                internals.restore_sums(self.trainer, saver.sums[1], torch.device("cpu"))

    saver = Recorder()
    trainer, expected = train(tmp_path, "sft", saver, save_strategy="steps", save_steps=2)
    resumed, _ = train(tmp_path / "other", "sft", Restore(), max_steps=1)
    resumed.args.max_steps = 3
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert result.training_loss == pytest.approx(expected)
    assert internals.trained_tokens(resumed) == internals.trained_tokens(trainer)


def test_learning_rate_is_that_of_the_next_step(tmp_path: Path) -> None:
    recorder = Recorder()
    train(tmp_path, "sft", recorder, lr_scheduler_type="linear")
    assert recorder.learning_rates == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernel(kernel: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(kernel)
    assert internals.attention_kernel(model) == kernel


def test_hooks_that_wit_trainer_overrides() -> None:
    prepare = inspect.signature(SFTTrainer._prepare_dataset).parameters
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(prepare) == expected
    assert list(inspect.signature(SFTTrainer._set_signature_columns_if_needed).parameters) == ["self"]
    assert "self._signature_columns = " in inspect.getsource(SFTTrainer._set_signature_columns_if_needed)
    assert "_signature_columns" in inspect.getsource(SFTTrainer._remove_unused_columns)


def test_hook_that_pair_trainer_overrides(tmp_path: Path) -> None:
    """It is the only place where DPOTrainer reads the rows' text, and its result is what the collator gets."""
    prepare = inspect.signature(DPOTrainer._prepare_dataset).parameters
    assert list(prepare) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    trainer, _ = train(tmp_path, "dpo")
    trainer._set_signature_columns_if_needed()
    assert set(columns) <= set(trainer._signature_columns)
    tokenised = trainer.train_dataset.select_columns(columns)
    again = PairTrainer(tiny_model(), tiny_model(), trainer.args, None, tokenised, processing_class=byte_tokenizer())
    batches = [next(iter(each.get_train_dataloader())) for each in (trainer, again)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_other_versions_are_refused() -> None:
    with pytest.raises(ImportError, match=r"trl 1\.16\.\d+ is not supported, only 1\.15\.\*; install that version"):
        require_version("trl", "1.15")
