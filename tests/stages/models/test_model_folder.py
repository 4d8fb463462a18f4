"""Loading from a model folder; tests/pipeline/store/test_security.py has the checks of the command."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.base import UserError
from stages.lm_eval.config import LMEvalStage, Task
from stages.lm_eval.model import load_model as load_evaluated
from stages.models.model_folder import check_model
from stages.models.tokenizer import load_training_tokenizer
from stages.training.model_io import load_model

EVALUATION = LMEvalStage(models=["it"], tasks=[Task(task="any")])


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    """A copy of the tiny model."""
    return shutil.copytree(model_folder, tmp_path / "model")


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_loader_reads_a_pickle(folder: Path, tmp_path: Path) -> None:
    """Even if check_model did not run."""
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "tokenizer.pkl", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "unpickled")))
    load_training_tokenizer(folder, [])
    with pytest.raises(UserError, match="holds no model that can be loaded"):
        load_model(folder, 0, None)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_evaluated(folder, EVALUATION, folder, print)
    check_model(folder, trusted=False, key="model", weights=False)
    load_model(folder, 0, None, random_init=True)
    assert not (tmp_path / "unpickled").exists()


def test_a_known_type_with_code_for_the_model_alone(folder: Path) -> None:
    """transformers has the config but no causal model, which shows only when it is loaded."""
    change(folder, "config.json", model_type="vit", auto_map={"AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('imported')")
    check_model(folder, trusted=False, key="model")
    with pytest.raises(UserError, match="its own Python files; if you trust them, set trust_remote_code: true"):
        load_model(folder, 0, None)
    with pytest.raises(UserError, match="it comes with its own Python files; if you trust them, set trust_remote_code"):
        load_evaluated(folder, EVALUATION, folder, print)


def test_a_tokenizers_own_code(folder: Path) -> None:
    change(folder, "config.json", model_type="unknown-to-transformers")
    change(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    (folder / "own.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match="set trust_remote_code: true"):
        load_training_tokenizer(folder, [])
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/other--own.Own", None]})
    with pytest.raises(UserError, match=r"its code, org/other--own\.Own, is not in its own folder"):
        check_model(folder, trusted=True, key="model")


def test_files_that_are_not_json(folder: Path) -> None:
    for text in ("[]", "{", "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"config\.json: (cannot be read as JSON|is not a JSON object)"):
            check_model(folder, trusted=False, key="model")


def test_a_saved_tokenizer_does_not_say_whether_this_machine_is_offline(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stages.models.tokenizer import load_tokenizer;"
        " load_tokenizer(Path(sys.argv[1])).save_pretrained(sys.argv[2])"
    )
    configs = []
    for offline in ("0", "1"):
        call = [sys.executable, "-c", program, str(folder), str(tmp_path / offline)]
        subprocess.run(call, env={**os.environ, "HF_HUB_OFFLINE": offline}, check=True)
        configs.append((tmp_path / offline / "tokenizer_config.json").read_bytes())
    assert configs[0] == configs[1]
