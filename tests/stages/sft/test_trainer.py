"""WITTrainer used alone: what it refuses, what it leaves out, what it says, and how it evaluates."""

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
from stages.data.tokenization import prepare
from stages.sft import WITConfig, WITTrainer
from tests.stages.sft.test_loss import EIGHT, ROWS, formula
from tests.tiny import byte_tokenizer, tiny_model

HALVES = {"prompt_loss_weight": 0.4, "completion_loss_weight": 0.6}


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
    """For each predicted token of `rows`: is it completion, its log-likelihood, is it the likeliest."""
    found = []
    for row in rows:
        ids = byte_tokenizer()(row["prompt"] + row["completion"] + "<end>").input_ids
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        for place in range(1, len(ids)):
            best = int(log_p[place - 1].argmax())
            found.append((place >= len(row["prompt"]), log_p[place - 1, ids[place]].item(), best == ids[place]))
    return found


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
def test_what_cannot_be_weighed_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"weight|packing_strategy|WIT loss|turns"):
        config(tmp_path, **fields)


def test_what_the_trainer_does_by_itself_is_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    given = {"model": tiny_model(), "args": config(tmp_path), "processing_class": byte_tokenizer()}
    with pytest.raises(ValueError, match="leave formatting_func out"):
        WITTrainer(**given, train_dataset=rows, formatting_func=str)
    with pytest.raises(ValueError, match="give a Dataset, not an IterableDataset"):
        WITTrainer(**given, train_dataset=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="prompt learning adds tokens that have no weight"):
        WITTrainer(**given, train_dataset=rows, peft_config=PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))


def test_rows_with_nothing_to_learn_are_left_out_and_counted(tmp_path: Path) -> None:
    """At max_length 8 the long prompt leaves no completion token; with weight on prompts it stays."""
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "a prompt of many letters", "completion": "d"}]
    made = trainer(tmp_path, rows, max_length=8)
    assert len(made.train_dataset) == 1
    used = made.used["train"]
    assert (used.rows_used, used.rows_without_weight, used.tokens_dropped, used.tokens_truncated) == (1, 1, 8, 18)
    assert len(trainer(tmp_path, rows, max_length=8, prompt_loss_weight=0.1).train_dataset) == 2
    with pytest.raises(
        UserError, match="every row of the train data lost its whole completion at max_length 8; raise max_length"
    ):
        trainer(tmp_path, rows[1:], max_length=8)


def test_prepared_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    """Rows prepared once serve every pair of weights."""
    rows = prepare(Dataset.from_list(ROWS), byte_tokenizer(), None)
    for weights in ((0.0, 1.0), (0.4, 0.6)):
        args = config(tmp_path, prompt_loss_weight=weights[0], completion_loss_weight=weights[1])
        model = tiny_model(dtype=torch.float64)
        made = WITTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer()
        )
        expected = formula(tiny_model(dtype=torch.float64), weights).item()
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


LAYOUTS = [{"per_device_eval_batch_size": n} for n in (1, 3, 4)] + [
    {"packing": True, "max_length": 90},
    {"packing": True, "max_length": 90, "eval_packing": False},
    {"padding_free": True, "per_device_eval_batch_size": 3},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_figures_do_not_depend_on_the_batches(tmp_path: Path, layout: dict[str, Any]) -> None:
    """They are sums over all rows, divided once; tokens of weight 0 are scored too."""
    model = tiny_model(dtype=torch.float64)
    tokens = tokens_of(model, EIGHT)
    for weights in ((0.4, 0.6), (0.0, 1.0)):
        made = trainer(
            tmp_path, ROWS, EIGHT, prompt_loss_weight=weights[0], completion_loss_weight=weights[1], **layout
        )
        found = made.evaluate()
        assert found["eval_loss"] == pytest.approx(formula(model, weights, EIGHT).item(), rel=1e-6)
        assert found["eval_prompt_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if not done]), rel=1e-6)
        assert found["eval_completion_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if done]), rel=1e-6)
        learnt = [top for done, _, top in tokens if done or weights[0]]
        assert found["eval_mean_token_accuracy"] == pytest.approx(mean([float(top) for top in learnt]))
        assert found["eval_weighted_tokens/completion"] == sum(done for done, _, _ in tokens)
        assert found.get("eval_weighted_tokens/prompt", 0) == (sum(not d for d, _, _ in tokens) if weights[0] else 0)
        assert found["eval_tokens_per_second"] > 0


def test_what_it_says_while_training(tmp_path: Path) -> None:
    """One step over all rows: the losses of the untrained model, weighted and not, and the counts behind them."""
    model = tiny_model(dtype=torch.float64)
    tokens = tokens_of(model, EIGHT)
    made = trainer(tmp_path, EIGHT, **HALVES, per_device_train_batch_size=3, gradient_accumulation_steps=3, max_steps=1)
    made.args.logging_steps = 1
    made.train()
    log = made.state.log_history[0]
    assert log["loss"] == pytest.approx(formula(model, (0.4, 0.6), EIGHT).item(), rel=1e-6)
    assert log["prompt_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if not done]), rel=1e-6)
    assert log["completion_loss"] == pytest.approx(-mean([p for done, p, _ in tokens if done]), rel=1e-6)
    assert log["mean_token_accuracy"] == pytest.approx(mean([float(top) for _, _, top in tokens]))
    assert log["weighted_tokens/prompt"] == sum(not done for done, _, _ in tokens)
    assert log["weighted_tokens/completion"] == sum(done for done, _, _ in tokens)
    assert log["num_tokens"] == len(tokens) + len(EIGHT)  # with each row's first
    assert log["tokens_per_second"] > 0


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 90}])
def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path, layout: dict[str, Any]) -> None:
    """The error says the step, the learning rate and the batch's rows; what was published before is not touched."""
    made = trainer(tmp_path, ROWS, learning_rate=0.125, per_device_train_batch_size=4, **layout)
    with torch.no_grad():
        made.model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError) as caught:
        made.train()
    message = str(caught.value)
    assert message.startswith("step 1: the loss is no finite number at learning rate 0.125;")
    rows = message.rsplit("data rows: ", 1)[1].split(", ")
    assert sorted(map(int, rows)) == [1, 2, 3, 4]
