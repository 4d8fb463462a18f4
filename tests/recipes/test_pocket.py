"""The embedded pocket world: its files are reproducible, its splits are clean, its scorers are strict."""

import filecmp
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "recipes" / "pocket"
BENCHMARKS = ("knowledge", "reasoning", "instructions")
FAMILIES = 22


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (POCKET / "data" / name).read_text(encoding="utf-8").splitlines()]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pocket_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scoring = load(POCKET / "tasks" / "scoring.py")
wordings = load(POCKET / "wordings.py")
WORDINGS: dict[str, list[str]] = {**wordings.KNOWLEDGE, **wordings.REASONING, **wordings.INSTRUCTIONS}


@pytest.fixture(scope="module")
def instructions() -> list[dict[str, Any]]:
    return read("instructions.train.jsonl")


@pytest.fixture(scope="module")
def preferences() -> list[dict[str, Any]]:
    return read("preferences.train.jsonl")


@pytest.fixture(scope="module")
def pretraining() -> str:
    return "\n".join(row["text"] for row in read("pretrain.jsonl"))


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict[str, Any]]]:
    return {name: read(f"{name}.test.jsonl") for name in BENCHMARKS}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET / "init")


@pytest.fixture(scope="module")
def exercises() -> Any:
    """The generator's own exercises, with what is needed to judge an answer to each."""
    sys.path.insert(0, str(POCKET))
    try:
        return importlib.import_module("exercises").exercises()
    finally:
        sys.path.remove(str(POCKET))


def prompt_of(row: dict[str, Any]) -> str:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


# ------------------------------------------------------------------------------------------------ files


def test_generating_again_gives_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(POCKET / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for folder in ("data", "init"):
        names = sorted(path.name for path in (POCKET / folder).iterdir())
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        _, differ, missing = filecmp.cmpfiles(POCKET / folder, tmp_path / folder, names, shallow=False)
        assert not differ
        assert not missing


def test_sizes(instructions: list[Any], preferences: list[Any], items: dict[str, list[Any]]) -> None:
    assert len(instructions) == FAMILIES * 138
    assert len(read("instructions.eval.jsonl")) == FAMILIES * 9
    assert len(preferences) == FAMILIES * 55
    for rows in items.values():
        assert len(rows) == 480
        assert sum(row["held_out"] for row in rows) == 240
    assert (POCKET / "data" / "pretrain.jsonl").stat().st_size < 5_000_000


def test_the_data_card_states_the_sizes() -> None:
    card = (POCKET / "README.md").read_text(encoding="utf-8")
    for path in sorted((POCKET / "data").iterdir()):
        assert f"| `data/{path.name}` | {len(read(path.name)):,} |" in card


def test_every_family_has_six_wordings_and_four_held_out(instructions: list[Any], items: dict[str, list[Any]]) -> None:
    seen = {(row["family"], row["wording"]) for row in instructions}
    assert seen == {(family, wording) for family in WORDINGS for wording in range(6)}
    asked = {(row["family"], row["wording"], row["held_out"]) for rows in items.values() for row in rows}
    assert asked == {(family, wording, wording >= 6) for family in WORDINGS for wording in range(10)}
    assert len(WORDINGS) == FAMILIES


# ---------------------------------------------------------------------------------------------- splits


def training_prompts() -> list[str]:
    names = ("instructions.train", "instructions.eval", "preferences.train")
    return [prompt_of(row) for name in names for row in read(f"{name}.jsonl")]


def as_pattern(wording: str) -> str:
    """Return a regular expression that matches every prompt in a wording."""
    return re.sub(r"\\{\w+\\}", r".+", re.escape(wording))


def test_held_out_wordings_are_absent_from_training() -> None:
    prompts = training_prompts()
    for texts in WORDINGS.values():
        for wording in texts[6:]:
            pattern = re.compile(as_pattern(wording))
            assert not [prompt for prompt in prompts if pattern.fullmatch(prompt)], wording


def test_prompts_of_one_intent_are_an_item_in_all_held_out_wordings(items: dict[str, list[Any]]) -> None:
    rows = read("wordings.test.jsonl")
    assert Counter(row["family"] for row in rows) == dict.fromkeys(WORDINGS, 8)
    questions = {row["question"] for each in items.values() for row in each}
    for row in rows:
        for wording, prompt in zip(WORDINGS[row["family"]][6:], row["prompts"], strict=True):
            assert re.fullmatch(as_pattern(wording), prompt), prompt
        assert questions & set(row["prompts"]), "the item is one of the benchmark's"
    assert not {prompt for row in rows for prompt in row["prompts"]} & set(training_prompts())


def test_the_pretraining_text_asks_in_no_wording_of_an_instruction(pretraining: str) -> None:
    asked = set(re.findall(r"User: (.*)", pretraining))
    assert len(asked) > 100
    for texts in WORDINGS.values():
        for wording in texts:
            pattern = re.compile(as_pattern(wording))
            assert not [line for line in asked if pattern.fullmatch(line)], wording


def test_no_benchmark_question_is_in_any_training_data(pretraining: str, items: dict[str, list[Any]]) -> None:
    questions = {row["question"] for rows in items.values() for row in rows}
    prompts = training_prompts()
    assert len(prompts) == len(set(prompts))
    assert not questions & set(prompts)
    assert not [question for question in questions if question in pretraining]


def test_no_fact_that_the_benchmark_asks_is_an_answer_in_training(
    pretraining: str, instructions: list[Any], preferences: list[Any], items: dict[str, list[Any]]
) -> None:
    facts = {row["choices"][row["target"]].strip() for row in items["knowledge"]}
    answers = {row["completion"][0]["content"] for row in instructions + read("instructions.eval.jsonl")}
    answers |= {row["chosen"][0]["content"] for row in preferences}
    answers |= set(re.findall(r"Assistant: (.*)<\|end\|>", pretraining))
    assert not facts & answers
    assert len(facts) == 480


def test_every_fact_that_the_benchmark_asks_is_stated_in_the_pretraining_text(pretraining: str, exercises: Any) -> None:
    sentences = [set(re.findall(r"\w+", sentence)) for sentence in re.split(r"[.\n]", pretraining)]
    stated = {(name, word) for words in sentences for name in words if name.istitle() for word in words}
    asked = [e.instance for e in exercises.bench if e.instance.family in wordings.KNOWLEDGE]
    assert len(asked) == 480
    assert not [i.slots["name"] for i in asked if (i.slots["name"], i.accepted[0]) not in stated]


CALCULATION = re.compile(
    r"(?P<sum>(\d+) plus (\d+) is|[Aa]dd (\d+) and (\d+),|sum of (\d+) and (\d+))"
    r"|(\d+) minus (\d+) is|If (?P<b>\d+) is taken from (?P<a>\d+),"
)


def calculations(text: str) -> set[tuple[str, int, int]]:
    """Return every sum (smaller number first) and difference that a text works out."""
    facts = set()
    for match in CALCULATION.finditer(text):
        if match["a"]:
            facts.add(("difference", int(match["a"]), int(match["b"])))
            continue
        a, b = (int(n) for n in re.findall(r"\d+", match[0]))
        facts.add(("sum", min(a, b), max(a, b)) if match["sum"] else ("difference", a, b))
    return facts


def test_no_sum_of_the_benchmark_is_worked_out_in_training(
    pretraining: str, instructions: list[Any], preferences: list[Any], items: dict[str, list[Any]]
) -> None:
    trained = calculations(pretraining + json.dumps(instructions) + json.dumps(preferences))
    asked = calculations("\n".join(row["answer"] for row in items["reasoning"]))
    assert len(trained) > 300
    assert len(asked) > 80
    assert not asked & trained


def test_no_instruction_answer_of_the_benchmark_is_trained_on(
    instructions: list[Any], preferences: list[Any], items: dict[str, list[Any]]
) -> None:
    def keyed(rows: list[Any], field: str) -> set[tuple[str, str]]:
        return {(row["family"], row[field][0]["content"]) for row in rows}

    trained = keyed(instructions, "completion") | keyed(preferences, "chosen")
    asked = {(row["family"], row["answer"]) for row in items["instructions"]}
    stated = {answer for answer in asked if not answer[1].startswith("It ")}  # "It is red." says not of what
    assert len(stated) > 400
    assert not stated & trained


# --------------------------------------------------------------------------------------------- scoring


def test_references_are_right_and_choices_differ(items: dict[str, list[Any]]) -> None:
    for row in items["knowledge"]:
        assert len(set(row["choices"])) == 4
        assert all(choice.startswith(" ") for choice in row["choices"])
    for row in items["reasoning"]:
        assert scoring.score_reasoning(row, [f" {row['answer']}"])["exact_match"] == 1
    for row in items["instructions"]:
        scores = scoring.score_instructions(row, [f" {row['answer']}"])
        assert scores["correct"] == scores["compliant"] == 1


def test_right_choices_are_spread_evenly(items: dict[str, list[Any]]) -> None:
    targets = Counter(row["target"] for row in items["knowledge"])
    assert set(targets) == {0, 1, 2, 3}
    assert max(targets.values()) < 150


def test_knowledge_takes_the_likeliest_choice() -> None:
    doc = {"target": 2, "held_out": True}
    results = [(-5.0, False), (-4.0, False), (-1.0, True), (-9.0, False)]
    assert scoring.score_knowledge(doc, results) == {"acc": 1, "acc_held_out": 1}
    assert scoring.score_knowledge({**doc, "target": 0}, results) == {"acc": 0, "acc_held_out": 0}
    assert scoring.score_knowledge({**doc, "held_out": False}, results) == {"acc": 1}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("14 plus 23 is 37.", True),
        (" 37", True),
        ("14 plus 23 is 38.", False),
        ("41 plus 23 is 37.", False),
        ("35, 36, 37, 38", False),
        ("14 plus 23 is 36. 14 plus 23 is 37.", False),
        ("", False),
    ],
)
def test_reasoning_score(response: str, right: bool) -> None:
    doc = {"answer": "14 plus 23 is 37.", "accepted": ["37"], "held_out": False}
    assert scoring.score_reasoning(doc, [response]) == {"exact_match": right}


COW = ["the cow says moo", "it says moo", "moo"]


@pytest.mark.parametrize(
    ("constraint", "argument", "response", "compliant", "correct"),
    [
        ("capitals", "", "THE COW SAYS MOO.", True, True),
        ("capitals", "", "THE COW SAYS BAA.", True, False),
        ("capitals", "", "The cow says moo.", False, False),
        ("capitals", "", "...", False, False),
        ("quotes", "", '"The cow says moo."', True, True),
        ("quotes", "", '"The cow says baa."', True, False),
        ("quotes", "", '"The cow" says "moo."', False, False),
        ("quotes", "", '""', False, False),
        ("twice", "", "The cow says moo. The cow says moo.", True, True),
        ("twice", "", "Baa. Baa.", True, False),
        ("twice", "", "Moo. Moo. Moo.", False, False),
        ("start", "Well", "Well, the cow says moo.", True, True),
        ("start", "Well", "Well, well.", True, False),
        ("start", "Well", "The cow says moo, well.", False, False),
        ("end", "my friend", "The cow says moo, my friend.", True, True),
        ("end", "my friend", "My friend, my friend.", True, False),
        ("end", "my friend", "The cow says moo.", False, False),
        ("include", "really", "The cow really says moo.", True, True),
        ("include", "really", "The cow really says baa.", True, False),
        ("include", "really", "The cow says moo.", False, False),
        ("include", "really", "really really", True, False),
    ],
)
def test_instruction_score(constraint: str, argument: str, response: str, compliant: bool, correct: bool) -> None:
    assert scoring.judge(response, constraint, argument, COW, []) == (compliant, correct)


@pytest.mark.parametrize(
    ("response", "compliant", "correct"),
    [
        ("The cow says moo.", True, True),
        ("A cow goes moo!", True, True),
        ("The cow says baa.", True, False),
        ("Moo, baa or woof.", True, False),
        ("Moo moo moo moo.", True, False),
        ("It says moo.", False, False),
    ],
)
def test_number_of_words(response: str, compliant: bool, correct: bool) -> None:
    assert scoring.judge(response, "words", "4", ["moo"], ["baa", "woof"]) == (compliant, correct)


@pytest.mark.parametrize(
    ("response", "compliant", "correct"),
    [
        ("plum, pear, apple", True, True),
        ("Plum, apple, pear.", True, True),
        ("plum, pear, hammer", True, False),
        ("plum, plum, pear", False, False),
        ("pear, plum, apple", False, False),
        ("plum, pear, apple, cherry", False, False),
        ("plum pear apple", False, False),
        ("plum, , apple", False, False),
    ],
)
def test_list_of_three(response: str, compliant: bool, correct: bool) -> None:
    members = ["apple", "pear", "plum", "cherry"]
    assert scoring.judge(response, "list", "plum", members, []) == (compliant, correct)


def test_rejected_answers_fail_and_chosen_pass(preferences: list[Any], exercises: Any) -> None:
    constraint_broken = wrong_content = 0
    for row, exercise in zip(preferences, exercises.preferences, strict=True):
        instance = exercise.instance
        assert prompt_of(row) == exercise.prompt
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen != rejected
        if instance.constraint:
            check = (instance.constraint, instance.argument, list(instance.accepted), list(instance.rivals))
            assert scoring.judge(chosen, *check) == (True, True)
            compliant, correct = scoring.judge(rejected, *check)
            assert not correct
            constraint_broken += not compliant
            wrong_content += compliant
        else:
            doc = {"answer": instance.answer, "accepted": list(instance.accepted), "held_out": False}
            assert scoring.score_reasoning(doc, [chosen]) == {"exact_match": 1}
            assert scoring.score_reasoning(doc, [rejected]) == {"exact_match": 0}
    assert constraint_broken > 100
    assert wrong_content > 100


# ----------------------------------------------------------------------------------- tokenizer and model


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    assert len(tokenizer) == 1024
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|end|>", None)
    for text in (
        "Ada lives in Oakham.",
        "  12 + 345 =\n\t!",
        "naïve café, 東京 🙂",
        "User: a\nAssistant: b<|end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("345") == ["3", "4", "5"]


def test_template_renders_many_turns(tokenizer: Any) -> None:
    turns = [("system", "S."), ("user", "A?"), ("assistant", "B."), ("user", "C?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "System: S.\nUser: A?\nAssistant: B.<|end|>\nUser: C?\nAssistant:"


def test_prompt_is_a_prefix_in_text_and_tokens(tokenizer: Any, instructions: list[Any]) -> None:
    for row in instructions[::10]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        assert whole == f"{prompt} {row['completion'][0]['content']}<|end|>"
        ids = tokenizer(prompt).input_ids
        assert tokenizer(whole).input_ids[: len(ids)] == ids


def test_ratio_of_prompt_to_completion_tokens(tokenizer: Any, instructions: list[Any]) -> None:
    ratios: dict[str, list[float]] = {family: [] for family in WORDINGS}
    for row in instructions:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        completion = f" {row['completion'][0]['content']}<|end|>"
        ratios[row["family"]].append(len(tokenizer(prompt).input_ids) / len(tokenizer(completion).input_ids))
    means = [sum(values) / len(values) for values in ratios.values()]
    assert 1 < sum(means) / len(means) < 2.5
    assert max(means) > 2 * min(means)


def test_documents_need_no_packing(tokenizer: Any) -> None:
    lengths = [len(ids) for ids in tokenizer([row["text"] for row in read("pretrain.jsonl")]).input_ids]
    assert max(lengths) <= 120
    assert sum(lengths) / len(lengths) > 95
    assert f"{sum(lengths):,} tokens" in (POCKET / "README.md").read_text(encoding="utf-8")


def test_model_config_has_about_a_million_parameters() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(POCKET / "init"))
    embeddings, attention, feed_forward, norm = 1024 * 128, 4 * 128**2, 3 * 128 * 384, 128
    assert model.num_parameters() == embeddings + 4 * (attention + feed_forward + 2 * norm) + norm
    assert not list((POCKET / "init").glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------- lm-eval


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("knowledge", {"acc"}),
        ("reasoning", {"exact_match"}),
        ("instructions", {"correct", "compliant"}),
    ],
)
def test_task_loads_in_lm_eval(
    name: str, metrics: set[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Any, items: dict[str, list[Any]]
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    manager = TaskManager(include_path=str(POCKET / "tasks"), include_defaults=False)
    task: Any = manager.load([f"pocket_{name}"])["tasks"][f"pocket_{name}"]
    task.build_all_requests(
        limit=4,
        rank=0,
        world_size=1,
        apply_chat_template=True,
        chat_template=lambda turns, **options: tokenizer.apply_chat_template(
            turns, tokenize=False, **{"add_generation_prompt": True, **options}
        ),
    )
    row, request = items[name][0], task.instances[0]
    context, then = request.args
    assert context == f"User: {row['question']}\nAssistant:"
    if name == "knowledge":
        assert len(task.instances) == 16
        assert then == row["choices"][0]
    else:
        assert len(task.instances) == 4
        assert then == {"until": ["\n"], "do_sample": False, "max_gen_toks": 40}
    assert set(task.aggregation()) == metrics | {f"{metric}_held_out" for metric in metrics}
