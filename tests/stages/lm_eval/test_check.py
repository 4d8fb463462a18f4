"""What is refused before an evaluation runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.base import Context
from stages.lm_eval.check import check
from tests.stages.lm_eval.conftest import CHOICE
from tests.stages.lm_eval.test_stage import own_task

Step = Callable[..., Context]
pytestmark = pytest.mark.usefixtures("own_tasks_only")


def problems(context: Context) -> list[tuple[str, str | None]]:
    """The messages of a check, each with its key."""
    return [(text, key) for key, text in check(context, on_this_machine=True).problems]


@pytest.mark.parametrize(
    ("settings", "options", "key", "message"),
    [
        ({"max_gen_toks": 512}, {}, "tasks.0.task", "up to 512 tokens, .* in the 512 tokens of wit"),
        ({}, {"max_length": 256}, "tasks.0.task", "up to 256 tokens, .* in the 256 tokens"),
        ({"max_gen_toks": 9}, {"gen_kwargs": {"max_gen_toks": 600}}, "options.gen_kwargs.max_gen_toks", "up to 600"),
        ({"max_new_tokens": 700}, {}, "tasks.0.task", "up to 700 tokens"),
        ({"until": ["\n", 5]}, {}, "tasks.0.task", "generation_kwargs of mine: until has 5, which is not text"),
        ({"until": True}, {}, "tasks.0.task", "until has True, which is not text; quote it"),
        ({}, {"gen_kwargs": {"until": [7], "max_gen_toks": 5}}, "options.gen_kwargs.until", "until has 7"),
        ({"num_beams": 100_000, "max_gen_toks": 5}, {}, "tasks.0.task", "num_beams of mine is 100000"),
        ({"temperature": -1, "max_gen_toks": 5}, {}, "tasks.0.task", "temperature of mine is -1"),
        ({"top_p": "x", "max_gen_toks": 5}, {}, "tasks.0.task", "top_p of mine is 'x'"),
        (
            {},
            {"gen_kwargs": {"max_time": -1, "max_gen_toks": 5}},
            "options.gen_kwargs.max_time",
            "max_time of mine is -1",
        ),
    ],
)
def test_answers_that_leave_no_room_and_stops_that_are_no_text(
    step: Step, world: Path, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], key: str, message: str
) -> None:
    section = own_task(tmp_path / "own", world, generation_kwargs={"do_sample": False} | settings)
    ((found, at),) = problems(step(**section, options=options))
    assert re.search(message, found)
    assert at == key


def test_an_answer_that_the_clock_ends_is_noted(step: Step, world: Path, tmp_path: Path) -> None:
    settings = {"max_time": 2.5, "max_gen_toks": 5, "temperature": 0.0, "do_sample": False}
    found = check(step(**own_task(tmp_path / "own", world, generation_kwargs=settings)), on_this_machine=True)
    assert found.problems == []
    assert ("tasks.0.task", "mine ends answers after 2.5 s, so its score depends on the machine") in found.notes


def test_what_fits_passes(step: Step, world: Path, tmp_path: Path) -> None:
    section = own_task(tmp_path / "own", world, generation_kwargs={"until": ["12:30", "no"], "max_gen_toks": 511})
    assert problems(step(**section)) == []


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "bothh"}], r"no task, group or tag 'bothh'; did you mean both"),
        ([{"task": "both"}, {"task": "part_b", "num_fewshot": 2}], "part_b.*keep one of the two"),
        ([{"task": "part_a"}, {"task": "all_parts"}], "part_a.*keep one of the two"),
        ([{"task": "both", "metric": "exact_match"}], "both reports no 'exact_match', only acc"),
    ],
)
def test_names_of_groups_and_a_task_twice(
    step: Step, world: Path, tmp_path: Path, tasks: list[dict[str, Any]], message: str
) -> None:
    """A task alone and in a group, or under a tag, would be scored once, with the settings of one of the two."""
    folder = tmp_path / "grouped"
    folder.mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}}}
    data |= {"fewshot_split": "test", "tag": ["all_parts"]}
    for name in ("part_a", "part_b"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(CHOICE | data | {"task": name, "dataset_name": None}))
    group: dict[str, Any] = {
        "group": "both",
        "task": ["part_a", "part_b"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    found = problems(step(tasks=tasks, include_path=str(folder)))
    assert len(found) == 1
    assert re.search(message, found[0][0])
