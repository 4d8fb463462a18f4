"""The parts of lm-eval and evaluate that stages/lm_eval overrides or patches. A failure means: check them, then raise
the versions in `require_version`."""

from __future__ import annotations

import inspect
from pathlib import Path

import evaluate
import pytest
import yaml
from lm_eval.api.registry import get_metric
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stages.lm_eval.model import EngineLM
from stages.system.library_versions import require_version
from tests.stages.lm_eval.conftest import GENERATE


def test_overridden_methods_of_the_model() -> None:
    parameters = {
        name: list(inspect.signature(getattr(HFLM, name)).parameters)
        for name in ("_loglikelihood_tokens", "tok_batch_encode")
    }
    assert parameters == {
        "_loglikelihood_tokens": ["self", "requests", "disable_tqdm", "override_bs"],
        "tok_batch_encode": ["self", "strings", "padding_side", "left_truncate_len", "truncation"],
    }
    assert all(isinstance(getattr(HFLM, name), property) for name in ("rank", "world_size"))
    assert all(name in vars(EngineLM) for name in ("rank", "world_size"))


def test_a_changed_task_index_is_what_the_manager_loads(tmp_path: Path) -> None:
    for folder, prompt in (("a", "old"), ("b", "new")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text('{"question": "?", "choices": ["a"], "answer": 0}\n')
        data = {"data_files": {"test": str(tmp_path / folder / "rows.jsonl")}, "cache_dir": str(tmp_path)}
        task = GENERATE | {"dataset_path": "json", "dataset_kwargs": data, "doc_to_text": prompt}
        (tmp_path / folder / "task.yaml").write_text(yaml.safe_dump(task))
    first, second = (TaskManager(include_path=tmp_path / folder, include_defaults=False) for folder in "ab")
    first.task_index["tiny_generate"] = second.task_index["tiny_generate"]
    assert first.load(["tiny_generate"])["tasks"]["tiny_generate"].config.doc_to_text == "new"


def test_lm_eval_loads_metrics_with_evaluate_and_hides_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def refuse(path: str) -> None:
        paths.append(path)
        raise RuntimeError

    monkeypatch.setattr(evaluate, "load", refuse)
    assert get_metric("org/metric") is None
    assert paths == ["org/metric"]


def test_an_unchecked_version_is_refused() -> None:
    require_version("evaluate", "0.4")
    with pytest.raises(ImportError, match=r"evaluate 0\.4\.\d+ is not supported, only 0\.3\.\*"):
        require_version("evaluate", "0.3")
