"""Fixtures for evaluations: a tiny random Llama with a chat template, and two tasks with their data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.base import Context, Input
from stages.lm_eval.config import LMEvalStage

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before datasets is imported: tests use no network

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CHOICE = {
    "task": "tiny_choice",
    "dataset_path": "org/not-reachable",
    "dataset_name": "main",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "dev",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.5},
}
GENERATE = {
    "task": "tiny_generate",
    "dataset_path": "org/not-reachable",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "</s>"], "do_sample": False, "max_gen_toks": 6},
    "filter_list": [
        {"name": "plain", "filter": [{"function": "take_first"}]},
        {
            "name": "letter",
            "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
        },
    ],
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
    ],
    "metadata": {"version": 2},
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama in float32 with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(5)
    shape = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two tasks in tasks/ and their items in test.jsonl and dev.jsonl."""
    path = tmp_path_factory.mktemp("world")
    items = [
        {
            "question": f"What is {'the colour of ' * (i % 4)}thing {i * 7}?",
            "choices": ["red as fire", "blue", "a green one", "white"][: 2 + i % 3],
            "answer": i % 2,
        }
        for i in range(24)
    ]
    for name, chosen in (("test", items[:20]), ("dev", items[20:])):
        path.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in chosen))
    (path / "tasks").mkdir()
    for task in (CHOICE, GENERATE):
        (path / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return path


@pytest.fixture
def step(tmp_path: Path, model_path: Path, world: Path) -> Callable[..., Context]:
    """A function that builds a step's context as the pipeline does: step(tasks=[...], options={...}, seed=...)."""
    count = 0

    def build(progress: Callable[[int, int, str], None] = lambda *_: None, **section: Any) -> Context:
        nonlocal count
        count += 1
        config = LMEvalStage(**({"models": ["wit"], "include_path": "./tasks"} | section))
        inputs = {
            key: Input(model_path, step="wit", kind="sft") if key == "model" else Input(world / need.value)
            for key, need in config.needs().items()
        }
        out, scratch, checkpoints, cache = (
            tmp_path / f"{count}-{name}" for name in ("out", "scratch", "checkpoints", "cache")
        )
        for folder in (out, scratch, checkpoints, cache):
            folder.mkdir()
        return Context("tiny", "bench[wit]", config, inputs, out, scratch, checkpoints, cache, progress)

    return build


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip lm-eval's own 14,000 task files, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *a, **k: init(self, *a, **(k | {"include_defaults": False}))
    )


def own_data(name: str, **settings: Any) -> dict[str, Any]:
    """A task entry that reads the items of `world`."""
    return {"task": name, "data": {"test": "test.jsonl", "dev": "dev.jsonl"}, **settings}
