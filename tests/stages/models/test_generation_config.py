"""What a checkpoint's generation config makes of a training and of its check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.base import UserError
from stages.models.generation_config import read_generation_config, unpublishable
from stages.sft.config import SFTStage
from tests.tiny import run_training


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def write(model: Path, values: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature", "top_p"}),  # of sampling, without do_sample
        ({"temperature": 0.5, "top_p": 0.9, "do_sample": True}, set()),
        ({"temperature": -1.0, "top_p": 0.9, "do_sample": True}, {"temperature"}),
        ({"top_p": 7.0, "top_k": -3, "do_sample": True}, {"top_p", "top_k"}),
        ({"top_k": 0, "top_p": 1.0, "do_sample": True}, set()),
        ({"length_penalty": 2.0}, {"length_penalty"}),  # of beams, without any
        ({"length_penalty": 2.0, "num_beams": 4}, set()),
        ({"num_beams": 100_000}, {"num_beams"}),
        ({"num_beams": 0}, {"num_beams"}),
        ({"repetition_penalty": 0.0}, {"repetition_penalty"}),
        ({"repetition_penalty": 1.1, "max_new_tokens": 100}, set()),
        ({"max_time": -1.0}, {"max_time"}),
        ({"temperature": "warm", "do_sample": True}, {"temperature"}),
    ],
)
def test_a_trained_model_can_be_saved_whatever_its_checkpoint_says(
    model: Path, tmp_path: Path, values: dict[str, Any], left_out: set[str]
) -> None:
    """Else transformers refuses to save the model after all of its training."""
    write(model, values)
    assert set(unpublishable(read_generation_config(model))) == left_out
    row = {"prompt": "Sky? ", "completion": "blue"}
    train = {"max_steps": 1, "use_cpu": True}
    section = {"data": {"train": "rows.jsonl"}, "weights": {"prompt": 0, "completion": 1}, "train": train}
    out = run_training(tmp_path, model, [row], SFTStage.model_validate(section))
    published = json.loads((out / "generation_config.json").read_text())
    assert {key: published.get(key) for key in values.keys() - left_out} == {
        key: value for key, value in values.items() if key not in left_out and key != "top_k"
    } | ({"top_k": 0} if values.get("top_k") == 0 else {})
    assert not left_out & published.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "its generation config cannot be read"),
        ({"max_new_tokens": 0}, "its generation config cannot be read: `max_new_tokens` must be greater than 0"),
        ({"cache_implementation": "bogus"}, "its generation config cannot be read: Invalid `cache_implementation`"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id of its generation config, 'x', is no token id"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_file(model: Path, values: Any, message: str) -> None:
    write(model, values)
    with pytest.raises(UserError) as error:
        read_generation_config(model)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f"; correct or delete {model}/generation_config.json")
