"""The `lm_eval` section of a recipe: validation, inputs, steps and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.base import Need, UserError
from stages.lm_eval.config import LMEvalStage, Options

TASK = {"task": "arc_easy"}


def test_needs_have_every_file_and_its_key() -> None:
    stage = LMEvalStage(
        models=["base", "wit"],
        include_path="./tasks",
        tasks=[TASK, {"task": "mine", "data": {"test": "./a.jsonl", "dev": "./b.jsonl"}}],
    )
    steps = stage.split()
    assert list(steps) == ["[base]", "[wit]"]
    assert steps["[wit]"].models == ["wit"]
    assert steps["[wit]"].needs() == {
        "model": Need("model", "wit", "models.0"),
        "include_path": Need("data", "./tasks", "include_path"),
        "data.mine.test": Need("data", "./a.jsonl", "tasks.1.data.test"),
        "data.mine.dev": Need("data", "./b.jsonl", "tasks.1.data.dev"),
    }
    assert [need.value for need in stage.needs().values() if need.kind == "model"] == ["base", "wit"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"models": []}, "at least 1 item"),
        ({"models": ["wit", "wit"]}, "named more than once: wit"),
        ({"tasks": []}, "at least 1 item"),
        ({"tasks": [TASK, TASK]}, "named more than once: arc_easy"),
        ({"tasks": [TASK | {"num_fewshot": -1}]}, "greater than or equal to 0"),
        ({"tasks": [TASK | {"data": {"test": "items.txt"}}]}, r"should be a file ending in \.json"),
        ({"tasks": [TASK | {"shots": 3}]}, "Extra inputs"),
        ({"options": {"fewshot_as_multiturn": True}}, "needs apply_chat_template"),
        ({"options": {"batch_size": 16}}, "counts the tokens of a pass, not requests; leave it out, or set 64 or more"),
        ({"options": {"limit": 0}}, "greater than or equal to 1"),
        ({"options": {"dtype": "int8"}}, "'bfloat16'"),
        ({"options": {"gen_kwargs": {"custom_generate": "org/x"}}}, "Extra inputs"),
        ({"tasks": [TASK | {"data": {"../test": "a.csv"}}]}, "is not a valid split name"),
        ({"tasks": [TASK | {"data": {"test": "a.csv"}, "dataset": "./d"}]}, "single files or a complete data set"),
        ({"launch": {"num_processes": 2}, "options": {"backend": "vllm"}}, "vllm uses as many GPUs as resources.gpus"),
        ({"launch": {"num_processes": 2, "use_fsdp": True}}, "raise resources.gpus instead"),
        ({"options": {"backend": "sglang"}}, "'hf' or 'vllm'"),
    ],
)
def test_invalid_settings_are_rejected(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LMEvalStage(**({"models": ["wit"], "tasks": [TASK]} | section))


def test_fewshot_examples_are_turns_with_a_chat_template() -> None:
    assert Options(apply_chat_template=True).multiturn is True
    assert Options(apply_chat_template=True, fewshot_as_multiturn=False).multiturn is False
    assert Options().multiturn is False


def test_config_imports_no_heavy_library() -> None:
    import subprocess
    import sys

    code = "import sys, stages.lm_eval.config; print(*{'torch', 'lm_eval', 'datasets'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == ""


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"max_length": 513}, "options.max_length", "513 tokens are more than the 512 that .* supports"),
        ({"backend": "vllm"}, "options.backend", r"not installed; pip install -e '\.\[vllm\]'"),
    ],
)
def test_check_rejects_what_the_model_or_machine_does_not_support(
    model_path: Path, options: dict[str, Any], key: str, message: str
) -> None:
    stage = LMEvalStage(models=["wit"], tasks=[TASK], options=options)
    with pytest.raises(UserError, match=message) as error:
        stage.check({"model": model_path})
    assert error.value.key == key


def test_a_data_set_must_be_a_folder(model_path: Path) -> None:
    stage = LMEvalStage(models=["wit"], tasks=[TASK | {"dataset": "./arc"}])
    assert stage.needs()["dataset.arc_easy"] == Need("data", "./arc", "tasks.0.dataset")
    with pytest.raises(UserError, match=r"\./arc is a file; name files under data"):
        stage.check({"model": model_path, "dataset.arc_easy": model_path / "config.json"})
