"""LoRA trains as in TRL, DPO's reference is where training starts, and what was trained is published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from stages.base import StageConfig, UserError
from stages.dpo.config import DPOStage
from stages.models.model_size import build
from stages.sft.config import SFTStage
from tests.tiny import byte_tokenizer, run_training, tiny_model

TRAIN = {
    "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True,
    "activation_checkpointing": False,
}  # fmt: skip
ROWS = [{"prompt": "Sky? ", "completion": "blue"}, {"prompt": "Snow? ", "completion": "a white one"}]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "red"} for row in ROWS]
LINEAR = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
QUERIES = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models: Llama with and without tied embeddings, Qwen2 (has biases), GPT-2 (has Conv1D)."""
    root = tmp_path_factory.mktemp("models")
    untied = tiny_model().config
    untied.tie_word_embeddings = False
    torch.manual_seed(0)
    small = {"vocab_size": 258, "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": None}
    qwen = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, model in {
        "tied": tiny_model(),
        "untied": LlamaForCausalLM(untied),
        "qwen": Qwen2ForCausalLM(Qwen2Config(**small, **qwen, num_key_value_heads=2, initializer_range=0.1)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    }.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


def run(
    folder: Path, model: Path, config: StageConfig, progress: Callable[[int, int, str], None] = lambda *_: None
) -> tuple[Path, dict[str, Any]]:
    """Run a stage; return the folder that it publishes, and the first row of its log."""
    out = run_training(folder, model, ROWS if config.kind == "sft" else PAIRS, config, progress=progress)
    return out, json.loads((out / "training_log.jsonl").read_text().splitlines()[0])


def sft(lora: dict[str, Any] | None, **section: Any) -> SFTStage:
    weights = {"prompt": 0, "completion": 1}
    return SFTStage.model_validate(
        {"data": {"train": "./r"}, "weights": weights, "train": TRAIN, "lora": lora, **section}
    )


def dpo(lora: dict[str, Any] | None, **section: Any) -> DPOStage:
    return DPOStage.model_validate({"data": {"train": "./r"}, "train": TRAIN, "lora": lora, **section})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits after the bytes of one row."""
    return model.eval()(input_ids=torch.tensor([byte_tokenizer()("Snow? a white one")["input_ids"]])).logits.float()


def from_folder(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def train_with_trl(folder: Path, model: Path, lora: dict[str, Any]) -> torch.Tensor:
    """Train with TRL's own SFTTrainer on the completions; return the trained model's logits."""
    set_seed(23)
    trainer = SFTTrainer(
        model=from_folder(model),
        args=SFTConfig(**TRAIN, output_dir=str(folder), seed=23, bf16=False, report_to="none", save_strategy="no"),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    trainer.train()
    return logits(trainer.model)


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("tied", LINEAR | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("tied", LINEAR | {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("tied", LINEAR | {"modules_to_save": ["embed_tokens"]}),
        ("tied", LINEAR | {"modules_to_save": ["embed_tokens", "lm_head"], "init_lora_weights": "gaussian"}),
        ("tied", LINEAR | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("tied", QUERIES | {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
        ("untied", QUERIES | {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("untied", LINEAR | {"trainable_token_indices": [97, 98, 256]}),
        ("untied", LINEAR | {"init_lora_weights": "orthogonal", "modules_to_save": ["norm", "lm_head"]}),
        ("untied", QUERIES | {"layers_to_transform": [1], "init_lora_weights": False}),
        ("untied", QUERIES | {"exclude_modules": ".*0.*v_proj", "target_parameters": ["mlp.up_proj.weight"]}),
        ("tied", LINEAR | {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"v_proj": 3}}),
        ("untied", LINEAR | {"init_lora_weights": "pissa_niter_2", "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("untied", LINEAR | {"init_lora_weights": "olora", "trainable_token_indices": [97], "rank_pattern": {"up": 2}}),
        ("qwen", QUERIES | {"lora_bias": True, "bias": "all"}),
        ("gpt2", LINEAR | {"init_lora_weights": "pissa", "modules_to_save": ["wte"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(sorted(set(value) - set(LINEAR))),
)
def test_trains_as_trl_does_and_publishes_what_was_trained(
    tmp_path: Path, models: Path, model: str, lora: dict[str, Any]
) -> None:
    """TRL's trained model, the published model, and the published adapter on the start model have the same logits."""
    build(models / model, "float32", False, json.dumps(lora))
    expected = train_with_trl(tmp_path / "trl", models / model, lora)
    start = from_folder(models / model)
    assert (expected - logits(start)).abs().max() > 0.01, "training moved it"
    out, _ = run(tmp_path / "sft", models / model, sft(lora))
    torch.testing.assert_close(logits(from_folder(out)), expected, rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(start, str(out / "adapter"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


STARTS: list[dict[str, Any]] = [
    {"init_lora_weights": start}
    for start in (True, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica")
] + [
    {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    {"init_lora_weights": "olora", "use_dora": True, "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
]


@pytest.mark.parametrize(
    ("model", "dtype", "lora"),
    [("untied", "bfloat16", lora) for lora in STARTS] + [("tied", "float32", STARTS[i]) for i in (2, 4, 7, 9)],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_dpo_starts_from_its_reference(
    tmp_path: Path, models: Path, model: str, dtype: str, lora: dict[str, Any]
) -> None:
    """At learning rate 0 the loss is ln 2, the margin 0, and the start model is published, within rounding."""
    train = TRAIN | {"learning_rate": 0.0, "max_steps": 1, "model_init_kwargs": {"dtype": dtype}}
    out, log = run(tmp_path / "dpo", models / model, dpo(LINEAR | lora, train=train))
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["rewards/margins"] == 0
    start = logits(from_folder(models / model, dtype=getattr(torch, dtype)))
    difference = (logits(from_folder(out, dtype="auto")) - start).norm() / start.norm()
    assert difference < (1e-5 if dtype == "float32" else 0.02)


def test_the_reference_does_not_move(tmp_path: Path, models: Path) -> None:
    """Rewards measured against a reference computed before training are those against the adapter's frozen copy."""
    lora = LINEAR | {"init_lora_weights": "pissa_niter_2", "modules_to_save": ["lm_head"]}
    logs = []
    for name, options in {"kept": {}, "before": {"precompute_ref_log_probs": True}}.items():
        train = TRAIN | {"max_steps": 6} | options
        out, _ = run(tmp_path / name, models / "tied", dpo(lora, train=train))
        logs.append([json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()])
    assert logs[0][5]["rewards/margins"] > 0.01
    for kept, before in zip(*logs, strict=True):
        assert kept.get("rewards/margins") == pytest.approx(before.get("rewards/margins"), abs=1e-5)
        assert kept.get("loss") == pytest.approx(before.get("loss"), abs=1e-5)


def test_a_model_that_is_not_the_trained_one_is_not_published(tmp_path: Path, models: Path) -> None:
    """The start model's file changes while it trains: the adapter is then merged into other weights."""
    model = tmp_path / "model"
    shutil.copytree(models / "untied", model)

    def progress(done: int, total: int, note: str) -> None:
        if "writing" in note:
            other = from_folder(model)
            other.lm_head.weight.data[:] *= 1.01
            other.save_pretrained(model)

    with pytest.raises(UserError, match=r"does not compute what was trained: its logits differ by 0\.0"):
        run(tmp_path / "sft", model, sft(LINEAR), progress)
    assert not (tmp_path / "sft" / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("lora", [None, LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [sft, dpo])
def test_special_tokens_are_published_as_training_set_them(
    tmp_path: Path, models: Path, kind: Callable[..., StageConfig], lora: dict[str, Any] | None
) -> None:
    """Both trainers add the tokenizer's EOS to the model's, and set the padding token."""
    model = from_folder(models / "tied")
    model.config.eos_token_id, model.config.pad_token_id = 65, 66
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 65, 66
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    out, _ = run(tmp_path / "it", tmp_path / "model", kind(lora))
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    end, pad = byte_tokenizer().eos_token_id, byte_tokenizer().pad_token_id
    assert (config["pad_token_id"], generation["pad_token_id"]) == (pad, pad)
    assert (config["eos_token_id"], generation["eos_token_id"]) == (end, [end, 65])


@pytest.mark.parametrize(
    ("model", "lora", "key", "message"),
    [
        ("untied", {"target_modules": ["q_proj", "lm_head"]}, "target_modules", "modules_to_save instead"),
        ("untied", {"target_modules": ".*(q_proj|lm_head)"}, "target_modules", "modules_to_save instead"),
        ("tied", QUERIES | {"trainable_token_indices": [5]}, "trainable_token_indices", "tied to the embeddings"),
        ("untied", QUERIES | {"trainable_token_indices": {"lm_head": [5]}}, "trainable_token_indices", "output layer"),
        (
            "untied",
            QUERIES | {"trainable_token_indices": [258]},
            "trainable_token_indices",
            "no token 258, only 0 to 257",
        ),
        ("qwen", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}, "lora_bias", "o_proj has no bias"),
        ("gpt2", LINEAR | {"init_lora_weights": "olora"}, "init_lora_weights", "no olora for .*c_attn, a Conv1D"),
        ("tied", {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "init_lora_weights", "no pissa"),
        (
            "tied",
            {"target_modules": [], "target_parameters": ["q_proj.weight"], "init_lora_weights": "pissa"},
            "init_lora_weights",
            "no pissa",
        ),
        ("tied", LINEAR | {"r": 20, "init_lora_weights": "pissa"}, "r", "20 is more than the rank of .*k_proj"),
    ],
)
def test_an_adapter_that_would_not_train_is_refused(
    models: Path, model: str, lora: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(models / model, "float32", False, json.dumps(lora))
    assert caught.value.key == f"lora.{key}"


def test_what_peft_refuses_is_refused_before_training(models: Path) -> None:
    with pytest.raises(UserError, match=r"PEFT cannot build this adapter: .*not found in the base model") as caught:
        build(models / "tied", "float32", False, json.dumps(QUERIES | {"layers_to_transform": [9]}))
    assert caught.value.key == "lora"


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        (sft, {"lora": {"init_lora_weights": "eva"}}, "cannot be eva: it needs activations"),
        (dpo, {"lora": {"init_lora_weights": "corda"}}, "cannot be corda: it needs covariances"),
        (sft, {"lora": {"init_lora_weights": "loftq"}}, "cannot be loftq: it replaces the model's weights"),
        (sft, {"lora": {"alora_invocation_tokens": [1]}}, "Extra inputs"),
        (sft, {"lora": {"layer_replication": [[0, 2]]}}, "Extra inputs"),
        (dpo, {"lora": {"init_lora_weights": False}}, "false starts from another model"),
        (dpo, {"lora": {"bias": "lora_only"}}, "train the reference's biases"),
        (
            sft,
            {"lora": {"init_lora_weights": "olora"}, "quantization": {"load_in_4bit": True}},
            "olora needs whole, unquantised weights",
        ),
        (
            dpo,
            {"lora": {"init_lora_weights": "pissa"}, "launch": {"num_processes": 2, "use_fsdp": True}},
            "leave launch.use_fsdp out",
        ),
    ],
)
def test_options_without_a_start_are_refused_with_the_recipe(
    kind: Callable[..., StageConfig], section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**section)
    assert message in str(caught.value)
