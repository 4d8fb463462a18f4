"""A small case of every kind of stage, run in this process, and its outputs as JSON.

Texts are lists of lines, so that a diff shows the line that changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.base import Context, Input
from stages.data.dataset_cache import load_rows
from stages.data.tokenization import Preparer
from stages.kinds import KINDS
from stages.models.tokenizer import load_training_tokenizer
from stages.records.metrics import Metrics
from stages.system.integrity import content_hash
from tests.golden.report_inputs import PUBLISHED_GRID, report_inputs
from tests.stages.judge import server as judge
from tests.stages.push import server as hub

Outputs = dict[str, Any]

POCKET = Path(__file__).parents[2] / "recipes" / "pocket"
MODEL = POCKET / "model"


def context(folder: Path, kind: str, section: Mapping[str, Any], inputs: Mapping[str, Input]) -> Context:
    """Create the context of a step in new folders below `folder`."""
    folders = [folder / name for name in ("out", "scratch", "checkpoints", "cache")]
    for each in folders:
        each.mkdir(parents=True)
    config = KINDS[kind].model_validate(section)
    return Context("golden", kind, config, dict(inputs), *folders, progress=lambda *_: None)


def run(step: Context) -> Metrics:
    """Run a step."""
    return step.config.load("run")(step)


def write_rows(file: Path, rows: list[Any]) -> Input:
    """Write rows to a JSONL file; return it as an input."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Input(file, fingerprint=content_hash(rows), reference=file.name)


def read_rows(file: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Read the first rows of a JSONL file; all by default."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def chat(*turns: str, system: str = "") -> list[dict[str, str]]:
    """A conversation whose turns alternate between user and assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


# ------------------------------------------------------------------------------------------------- training

CONVERSATIONS = [
    {"messages": chat("How much is 29 plus 6?", "29 plus 6 is 35.")},
    {"messages": chat("Who is it?", "Ann.", "Where does she live?", "Ann lives in Ashford.", system="Be brief.")},
    {"messages": chat("Où est le café?", "Là-bas 🙂.")},
    {"messages": chat("Say nothing.", "Now.", "Tell me the town where Ted lives. " * 8, "Ted lives in Ashford.")},
]
PROMPTS = [
    {"prompt": "Sky? ", "completion": "It is blue."},
    {"prompt": "The snow", "completion": "flake is white."},
    {"prompt": "5", "completion": "true"},
    {"prompt": chat("What is the opposite of safe?"), "completion": chat("", "Dangerous.")[1:]},
]
DATA: dict[str, tuple[list[Any], dict[str, Any], int | None]] = {
    "messages": (CONVERSATIONS, {}, 64),
    "messages, last turn": (CONVERSATIONS, {"turns": "last"}, None),
    "prompt and completion": (PROMPTS[:3], {}, None),
    "chat prompt and completion": (PROMPTS[3:], {}, None),
    "text": ([{"text": "The bell is in the tower."}, {"text": " Ida has the age of 30.\n"}], {"format": "text"}, 8),
    "alpaca": (
        [
            {"instruction": "Add the numbers.", "input": "35 and 6", "output": "41"},
            {"instruction": "Name a colour.", "input": "", "output": "Red."},
        ],
        {"format": "alpaca"},
        None,
    ),
    "official": ([{"prompt": "Sky? ", "completion": "It is blue."}], {"format": "official"}, None),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]}],
        {"format": "sharegpt"},
        None,
    ),
    "tokens": ([{"input_ids": [5, 6, 7, 8], "loss_weights": [0, 0.25, 1, 2]}], {"format": "tokens"}, None),
    "weighted messages": (
        [{"messages": [*chat("One?"), {"role": "assistant", "content": "First.", "weight": 0.5}]}],
        {},
        None,
    ),
    "unusable rows dropped": ([*CONVERSATIONS[:1], {"messages": chat("Alone?")}], {"on_bad_row": "drop"}, None),
}
"""Name of a data set -> its rows, the `data` section and max_length."""
TRAIN = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 3e-4, "use_cpu": True}
NOISY = re.compile(r"grad_norm|accurac|logps|logits|entropy|flos")
"""Logged values that are not compared: sums of many terms, and those that a near tie could change."""
LOSS_ROW = re.compile(r"\| (train_loss|eval_loss|reward_\w+) \|")
"""Rows of a card with rounded values, which can differ in the last digit."""


def sft(folder: Path) -> Outputs:
    """Prepared rows of every data format; counts and losses of two trainings."""
    prepared = {}
    for number, (name, (rows, data, max_length)) in enumerate(DATA.items()):
        place = folder / f"rows{number}"
        source = write_rows(place / "rows.jsonl", rows)
        section = {"data": {"train": "rows.jsonl", **data}, "weights": {"prompt": 0.2, "completion": 0.8}}
        step = context(place, "sft", section, {"train": source})
        first = next(step.config.rows(source.path, "train"))[1]
        preparer = Preparer(load_training_tokenizer(MODEL, [first], False), max_length, step.config.data.turns)
        dataset, report = load_rows(step, "train", preparer)
        # lists as text, so that each is one line of the file
        texts = [
            {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            for row in dataset
        ]
        prepared[name] = {"rows": texts, "dropped": report.dropped}
    train, evaluation = POCKET / "data" / "instructions.train.jsonl", POCKET / "data" / "instructions.eval.jsonl"
    inputs = {
        "model": Input(MODEL, reference="pocket"),
        "train": write_rows(folder / "train.jsonl", read_rows(train, 12)),
        "eval": write_rows(folder / "eval.jsonl", read_rows(evaluation, 6)),
    }
    files = {"train": "train.jsonl", "eval": "eval.jsonl"}
    wit = {"data": files, "weights": {"prompt": 0.2, "completion": 0.8, "template": 0.1}, "train": TRAIN}
    packing = {"packing": True, "max_length": 96, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    packed = {
        "data": files,
        "weights": {"prompt": 0, "completion": 1},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "train": TRAIN | packing,
    }
    trainings = {
        name: trained(context(folder / name, "sft", section, inputs))
        for name, section in {"full": wit, "packed, LoRA": packed}.items()
    }
    return {"prepared": prepared, "trainings": trainings}


def trained(step: Context) -> Outputs:
    """Train; return counts, the losses of the log, the names of the published files and the card without its losses."""
    metrics = run(step)
    log = [
        {key: value for key, value in row.items() if not NOISY.search(key)}
        for row in read_rows(step.out / "training_log.jsonl")
    ]
    return {
        "steps": metrics.steps,
        "tokens": metrics.tokens,
        "data": metrics.data,
        "notes": metrics.notes,
        "log": log,
        "files": sorted(str(file.relative_to(step.out)) for file in step.out.rglob("*") if file.is_file()),
        "card": [line for line in lines(step.out / "README.md") if not LOSS_ROW.match(line)],
    }


def dpo(folder: Path) -> Outputs:
    """Losses of a training on preference pairs, and of one on pairs drawn from instruction data, with LoRA."""
    model = {"model": Input(MODEL, reference="pocket")}
    pairs = read_rows(POCKET / "data" / "preferences.train.jsonl", 8)
    rows = read_rows(POCKET / "data" / "instructions.train.jsonl", 8)
    drawn = {
        "data": {"train": "rows.jsonl", "rejected": "other_row"},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "train": TRAIN,
    }
    columns = {"data": {"train": "pairs.jsonl", "eval": "pairs.jsonl"}, "train": TRAIN | {"learning_rate": 1e-4}}
    pair_file = write_rows(folder / "pairs.jsonl", pairs)
    return {
        "columns": trained(context(folder / "1", "dpo", columns, model | {"train": pair_file, "eval": pair_file})),
        "other rows, LoRA": trained(
            context(folder / "2", "dpo", drawn, model | {"train": write_rows(folder / "rows.jsonl", rows)})
        ),
    }


# --------------------------------------------------------------------------------------------------- scores


TOWNS = {
    "Tell me the town where Ben lives.": "Ben lives in Westport.",
    "Which town does Donna live in?": "Donna lives in Coldbrook.",
    "The home of Greta is in which town?": "Greta lives in Oakham.",
    "Tell me the town where Hugo lives.": "Hugo lives in Glenrock.",
    "Tell me the town where Floyd lives.": "In Westport.",
    "Say where Willa lives, please.": "Willa lives in Marlow, which is a town.",
    "Where does Cora live?": "I do not know.",
}
"""Questions that the pocket model answers without a near tie -> an answer. It answers the first four like that."""


def scored(step: Context, *keys: str) -> Outputs:
    """Run an evaluation; return its score rows, and these keys of its samples."""
    metrics = run(step)
    samples = {
        task: [{key: sample[key] for key in keys if key in sample} for sample in read_rows(step.out / name)]
        for task, name in metrics.samples.items()
    }
    return {"rows": [row.model_dump() for row in metrics.results or []], "samples": samples}


def lm_eval(folder: Path) -> Outputs:
    """Scores and answers of the pocket model in two benchmarks: likelihoods of choices, and greedy answers."""
    section = {
        "models": ["base"],
        "include_path": str(POCKET / "tasks"),
        "tasks": [
            {"task": "pocket_knowledge", "num_fewshot": 0, "metric": "acc", "data": {"test": "knowledge.jsonl"}},
            {"task": "pocket_reasoning", "num_fewshot": 0, "data": {"test": "reasoning.jsonl"}},
        ],
        "options": {"apply_chat_template": True},
    }
    sums = read_rows(POCKET / "data" / "reasoning.test.jsonl")
    towns = [
        {"question": question, "answer": answer, "accepted": [], "family": "town", "wording": 0, "held_out": i > 0}
        for i, (question, answer) in enumerate(list(TOWNS.items())[:3])
    ]
    inputs = {
        "model": Input(MODEL, reference="pocket"),
        "include_path": Input(POCKET / "tasks"),
        "data.pocket_knowledge.test": write_rows(
            folder / "knowledge.jsonl", read_rows(POCKET / "data" / "knowledge.test.jsonl", 6)
        ),
        "data.pocket_reasoning.test": write_rows(folder / "reasoning.jsonl", [*towns, sums[30], sums[148]]),
    }
    outputs = scored(context(folder / "step", "lm_eval", section, inputs), "arguments", "filtered_resps")
    for sample in outputs["samples"]["pocket_knowledge"]:
        sample["filtered_resps"] = [float(log_prob) for log_prob, _is_greedy in sample["filtered_resps"]]
    return outputs


def sensitivity(folder: Path) -> Outputs:
    """POSIX of the pocket model on three sets of wordings, with variants and an example before each prompt."""
    examples = [{"prompt": "Where does Julia live?", "answer": "Julia lives in Kingsbury."}]
    vary = {"spelling": 1, "case": ["lower"], "templates": ["{prompt}", "Please: {prompt}"]}
    prompts = [
        {"name": "plain", "data": "sets.jsonl", "max_new_tokens": 8},
        {"name": "varied", "data": "sets.jsonl", "max_new_tokens": 4, "vary": vary, "num_fewshot": 1,
         "examples": "examples.jsonl"},
    ]  # fmt: skip
    options = {"apply_chat_template": True}
    section = {"models": ["base"], "prompts": prompts, "options": options}
    wordings = read_rows(POCKET / "data" / "wordings.test.jsonl")
    sets = write_rows(folder / "sets.jsonl", [wordings[number] for number in (25, 30, 47)])
    inputs = {"model": Input(MODEL, reference="pocket"), "data.plain": sets, "data.varied": sets}
    inputs["examples.varied"] = write_rows(folder / "examples.jsonl", examples)
    return scored(context(folder / "step", "sensitivity", section, inputs), "prompts", "responses", "lengths", "posix")


def characteristics(folder: Path) -> Outputs:
    """Characteristics of training rows and of the questions of a benchmark. Parse trees need spaCy and are left out."""
    sets = [
        {"name": "train", "role": "train", "data": {"train": "train.jsonl"}},
        {
            "name": "know",
            "role": "eval",
            "data": {"train": "know.jsonl", "format": "text", "columns": {"text": "question"}},
        },
    ]
    section = {"models": ["base"], "sets": sets, "options": {"limit": 6}}
    inputs = {
        "model": Input(MODEL, reference="pocket"),
        "data.train": write_rows(folder / "train.jsonl", read_rows(POCKET / "data" / "instructions.train.jsonl", 8)),
        "data.know": write_rows(folder / "know.jsonl", read_rows(POCKET / "data" / "knowledge.test.jsonl", 8)),
    }
    outputs = scored(context(folder / "step", "characteristics", section, inputs))
    outputs["rows"] = [row for row in outputs["rows"] if row["metric"] != "parse_tree_depth"]
    return outputs


# ---------------------------------------------------------------------------------------------------- judge

QUESTIONS = [  # of these categories, the answers are greedy
    {"question_id": number, "category": category, "turns": [question, "Where does Julia live?"]}
    for number, category, question in zip((101, 111), ("reasoning", "math"), TOWNS, strict=False)
]
REFERENCES = [
    {"question_id": 101, "choices": [{"turns": ["In Westport.", "In Kingsbury."]}]},
    {"question_id": 111, "choices": [{"turns": ["In Coldbrook.", "In Kingsbury."]}]},
]
JUDGE_PROMPTS = [
    {
        "name": f"single{'-math' * is_math}-v1{'-multi-turn' * is_second}",
        "system_prompt": f"Be {'exact' if is_math else 'fair'}{' on the second' * is_second}.",
        "prompt_template": "\n".join(
            f"Q {{question{turn}}}\n" + f"R {{ref_answer{turn or '_1'}}}\n" * is_math + f"A {{answer{turn}}}"
            for turn in (("_1", "_2") if is_second else ("",))
        ),
    }
    for is_math in (False, True)
    for is_second in (False, True)
]
INSTRUCTIONS = [  # the first output equals the model's answer, so the judge is not asked
    {"instruction": question, "output": answer + "!" * 7 * i, "generator": "reference", "dataset": "own"}
    for i, (question, answer) in enumerate(TOWNS.items())
]


def reply(request: dict[str, Any]) -> judge.Answer:
    """A grade, or a preference against the reference, that depends on the request's text alone."""
    prompt = request["messages"][-1]["content"]
    digest = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    if '"instruction"' not in prompt:
        return f"Rating: [[{1 + digest % 10}]]"
    first_output = re.findall(r'"output": """(.*?)"""', prompt)[0]
    share = 0.1 + digest % 3 / 10 if first_output.endswith("!") else 0.7 + digest % 3 / 10
    shares = {"m": share, "M": 1 - share}
    top = [{"token": token, "bytes": None, "logprob": math.log(value)} for token, value in shares.items()]
    first = {**top[0], "top_logprobs": top}
    return {"message": {"role": "assistant", "content": "m"}, "logprobs": {"content": [first], "refusal": None}}


def judge_case(folder: Path) -> Outputs:
    """Scores of MT-Bench and AlpacaEval, the model's greedy answers and all requests to the judge."""
    files = {
        "mt_bench": {"questions": QUESTIONS, "references": REFERENCES, "prompts": JUDGE_PROMPTS},
        "alpaca_eval": {"instructions": INSTRUCTIONS},
    }
    inputs = {"model": Input(MODEL, "wit", "sft")}
    section: dict[str, Any] = {"models": ["wit"], "judge": "gpt-judge"}
    for benchmark, tables in files.items():
        section[benchmark] = {name: f"{name}.jsonl" for name in tables}
        for name, rows in tables.items():
            inputs[f"{benchmark}.{name}"] = write_rows(folder / f"{name}.jsonl", rows)
    section["options"] = {"max_new_tokens": 12, "timeout": 20.0}
    with pytest.MonkeyPatch.context() as patch, judge.serving(reply) as server:
        patch.setenv("OPENAI_BASE_URL", server.url)
        patch.setenv("OPENAI_API_KEY", judge.KEY)
        outputs = scored(context(folder / "step", "judge", section, inputs), "prompts", "responses")
        requests = sorted(server.requests, key=json.dumps)
    for request in requests:
        for message in request["messages"]:
            message["content"] = message["content"].split("\n")
    return outputs | {"requests": requests}


# ------------------------------------------------------------------------------------------- report and push


def report(folder: Path) -> Outputs:
    """Report files of hand-made scores: models, differences, a grid, preference tuning and sensitivity."""
    inputs = report_inputs()
    published = folder / "published.csv"
    published.parent.mkdir(parents=True, exist_ok=True)
    published.write_text(PUBLISHED_GRID, encoding="utf-8")
    section = {"title": "Golden", "model_name": "Pocket", "data_name": "Own", "published": "published.csv"}
    step = context(folder / "step", "report", section, inputs | {"file:published": Input(published)})
    metrics = run(step)
    texts = {name: lines(step.out / name) for name in ("report.md", "results.csv", "tables.tex")}
    figures = sorted(file.name for file in (step.out / "figures").iterdir())
    return {"summary": metrics.summary, "table": metrics.to_json()["table"], "figures": figures, **texts}


def lines(file: Path) -> list[str]:
    """The lines of a text file."""
    return file.read_bytes().decode().split("\n")


def push(folder: Path) -> Outputs:
    """The files that the hub received: the card's lines, and hashes of the others. The first push is of a DPO model."""
    inputs = report_inputs()
    scores = {"results.0": inputs["bench[dpo]"]}
    tuned = inputs["bench[dpo]"].inputs["model"]
    model = Input(MODEL, tuned.step, tuned.kind, "", tuned.config, tuned.metrics, tuned.inputs)
    received = {}
    with pytest.MonkeyPatch.context() as patch, hub.serving() as server:
        patch.setenv("HF_TOKEN", hub.TOKEN)
        patch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for repo, source, more in (
            ("lab/scored", model, scores),
            ("lab/plain", Input(MODEL, "wit", "sft", "", *_sft_of(tuned)), {}),
        ):
            section = {"model": "dpo", "repo": repo, "license": "apache-2.0" if more else None}
            metrics = run(context(folder / repo, "push", section, {"model": source, **more}))
            files = server.repos[repo].files
            received[repo] = {
                "private": server.repos[repo].private,
                "count": metrics.to_json()["files"],
                "card": files.pop("README.md").decode().split("\n"),
                "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
            }
    return received


def _sft_of(tuned: Input) -> tuple[dict[str, Any], Metrics, dict[str, Input]]:
    """Config, metrics and inputs of the training that a DPO model started from."""
    start = tuned.inputs["model"]
    return start.config, start.metrics, start.inputs


CASES: dict[str, Callable[[Path], Outputs]] = {
    "sft": sft,
    "dpo": dpo,
    "lm_eval": lm_eval,
    "judge": judge_case,
    "sensitivity": sensitivity,
    "characteristics": characteristics,
    "report": report,
    "push": push,
}
