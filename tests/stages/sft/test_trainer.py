"""WITTrainer without the pipeline: refused settings, dropped rows, logs and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import LlamaForCausalLM
from trl import SFTTrainer

from stages.base import UserError
from stages.data.tokenization import Preparer, prepare
from stages.sft import WITConfig, WITTrainer
from tests.stages.sft.test_loss import EIGHT, ROWS, formula
from tests.tiny import byte_tokenizer, tiny_model

WEIGHTS = {"prompt_loss_weight": 0.4, "completion_loss_weight": 0.6}


def config(folder: Path, **fields: Any) -> WITConfig:
    defaults = {"report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no"}
    return WITConfig(output_dir=str(folder), **defaults | {"activation_checkpointing": False} | fields)


def trainer(folder: Path, rows: list[dict], eval_rows: list[dict] | None = None, **fields: Any) -> WITTrainer:
    return WITTrainer(
        model=tiny_model(dtype=torch.float64),
        args=config(folder, **fields),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=byte_tokenizer(),
    )


def tokens_of(model: LlamaForCausalLM, rows: list[dict]) -> list[tuple[bool, float, bool]]:
    """For each predicted token of `rows`: is it completion, its log-likelihood, is it the most likely token."""
    tokens = []
    for row in rows:
        ids = byte_tokenizer()(row["prompt"] + row["completion"] + "<end>").input_ids
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        for place in range(1, len(ids)):
            best = int(log_p[place - 1].argmax())
            tokens.append((place >= len(row["prompt"]), log_p[place - 1, ids[place]].item(), best == ids[place]))
    return tokens


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_it_is_an_sft_trainer() -> None:
    assert issubclass(WITTrainer, SFTTrainer)


def test_defaults_are_conventional_instruction_tuning(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert (args.prompt_loss_weight, args.completion_loss_weight) == (0.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_loss_weight": -0.1},
        {"completion_loss_weight": float("nan")},
        {"template_loss_weight": float("inf")},
        {"prompt_loss_weight": 0.0, "completion_loss_weight": 0.0},
        {"packing": True, "packing_strategy": "wrapped"},
        {"assistant_only_loss": True},
        {"turns": "first"},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_settings_that_conflict_with_the_weights_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"weight|packing_strategy|turns"):
        config(tmp_path, **fields)


def test_arguments_that_conflict_with_the_weights_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    arguments = {"model": tiny_model(), "args": config(tmp_path), "processing_class": byte_tokenizer()}
    with pytest.raises(ValueError, match="leave formatting_func out"):
        WITTrainer(**arguments, train_dataset=rows, formatting_func=str)
    with pytest.raises(ValueError, match="give a Dataset, not an IterableDataset"):
        WITTrainer(**arguments, train_dataset=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="prompt learning adds tokens that have no weight"):
        WITTrainer(**arguments, train_dataset=rows, peft_config=PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))


def test_rows_without_weight_are_left_out_and_counted(tmp_path: Path) -> None:
    """At max_length 8 the long prompt leaves no completion token; the row stays if prompts have a weight."""
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "a prompt of many letters", "completion": "d"}]
    truncating = trainer(tmp_path, rows, max_length=8)
    assert len(truncating.train_dataset) == 1
    stats = truncating.used["train"]
    assert (stats.rows_used, stats.rows_without_weight, stats.tokens_dropped, stats.tokens_truncated) == (1, 1, 8, 18)
    assert len(trainer(tmp_path, rows, max_length=8, prompt_loss_weight=0.1).train_dataset) == 2
    with pytest.raises(
        UserError, match="every row of the train data lost its completion at max_length 8; raise max_length"
    ):
        trainer(tmp_path, rows[1:], max_length=8)


def test_prepared_rows_are_not_prepared_again(tmp_path: Path) -> None:
    """Rows prepared once serve every pair of weights."""
    rows = prepare(Dataset.from_list(ROWS), Preparer(byte_tokenizer(), None))
    for weights in ((0.0, 1.0), (0.4, 0.6)):
        args = config(tmp_path, prompt_loss_weight=weights[0], completion_loss_weight=weights[1])
        model = tiny_model(dtype=torch.float64)
        wit_trainer = WITTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer()
        )
        expected = formula(tiny_model(dtype=torch.float64), weights).item()
        assert wit_trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


LAYOUTS = [{"per_device_eval_batch_size": n} for n in (1, 3, 4)] + [
    {"packing": True, "max_length": 90},
    {"packing": True, "max_length": 90, "eval_packing": False},
    {"padding_free": True, "per_device_eval_batch_size": 3},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_metrics_do_not_depend_on_the_batches(tmp_path: Path, layout: dict[str, Any]) -> None:
    """They are averages over all tokens; tokens of weight 0 are scored too."""
    model = tiny_model(dtype=torch.float64)
    tokens = tokens_of(model, EIGHT)
    for weights in ((0.4, 0.6), (0.0, 1.0)):
        evaluating = trainer(
            tmp_path, ROWS, EIGHT, prompt_loss_weight=weights[0], completion_loss_weight=weights[1], **layout
        )
        metrics = evaluating.evaluate()
        assert metrics["eval_loss"] == pytest.approx(formula(model, weights, EIGHT).item(), rel=1e-6)
        assert metrics["eval_prompt_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if not done]), rel=1e-6)
        assert metrics["eval_completion_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if done]), rel=1e-6)
        correct = [top for done, _, top in tokens if done or weights[0]]
        assert metrics["eval_mean_token_accuracy"] == pytest.approx(mean([float(top) for top in correct]))
        assert metrics["eval_weighted_tokens/completion"] == sum(done for done, _, _ in tokens)
        assert metrics.get("eval_weighted_tokens/prompt", 0) == (sum(not d for d, _, _ in tokens) if weights[0] else 0)
        assert metrics["eval_tokens_per_second"] > 0


def test_training_log(tmp_path: Path) -> None:
    """One step over all rows: weighted and unweighted losses of the untrained model, and token counts."""
    model = tiny_model(dtype=torch.float64)
    tokens = tokens_of(model, EIGHT)
    fields = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 1, "logging_steps": 1}
    training = trainer(tmp_path, EIGHT, **WEIGHTS, **fields)
    training.train()
    log = training.state.log_history[0]
    assert log["loss"] == pytest.approx(formula(model, (0.4, 0.6), EIGHT).item(), rel=1e-6)
    assert log["prompt_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if not done]), rel=1e-6)
    assert log["completion_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if done]), rel=1e-6)
    assert log["mean_token_accuracy"] == pytest.approx(mean([float(top) for _, _, top in tokens]))
    assert log["weighted_tokens/prompt"] == sum(not done for done, _, _ in tokens)
    assert log["weighted_tokens/completion"] == sum(done for done, _, _ in tokens)
    assert log["num_tokens"] == len(tokens) + len(EIGHT)  # and each row's first
    assert log["tokens_per_second"] > 0


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 90}])
def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, layout: dict[str, Any]) -> None:
    """The error names the step, the learning rate and the batch's rows."""
    training = trainer(tmp_path, ROWS, learning_rate=0.125, per_device_train_batch_size=4, **layout)
    with torch.no_grad():
        training.model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError) as caught:
        training.train()
    message = str(caught.value)
    assert message.startswith("step 1: the loss is not finite at learning rate 0.125;")
    rows = message.rsplit("data rows: ", 1)[1].split(", ")
    assert sorted(map(int, rows)) == [1, 2, 3, 4]
