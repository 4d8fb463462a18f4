"""Hand-made scores for the report: single models, a grid over two seeds, preference tuning and sensitivity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.base import Input
from stages.records.metrics import Metrics, ScoreRow

PUBLISHED_GRID = """\
model,dataset,prompt_weight,response_weight,average_score
Pocket,Own,0,0,20
Pocket,Own,0,0.5,41
Pocket,Own,0,1,40
Pocket,Own,0.2,0.5,46
Pocket,Own,0.2,1,43
"""
GRID = {  # prompt, completion -> a score for each of two seeds
    (0.0, 1.0): (0.40, 0.44),
    (0.0, 0.5): (0.41, 0.41),
    (0.2, 0.5): (0.50, 0.54),
    (0.2, 1.0): (0.30, 0.32),
}


def row(task: str, value: float | None, stderr: float | None = None, **fields: Any) -> ScoreRow:
    """A score as a benchmark returns it."""
    defaults = {"metric": "acc", "filter": "none", "n": 100, "headline": True, "higher_is_better": True}
    return ScoreRow(**({"task": task, "value": value, "stderr": stderr} | defaults | fields))


def base() -> Input:
    """The model that no step trained."""
    return Input(Path("pocket"), reference="pocket")


def sft(step: str, prompt: float, completion: float, seed: int = 23, **labels: str) -> Input:
    """A model trained with these weights."""
    config = {
        "weights": {"prompt": prompt, "completion": completion},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 400, "learning_rate": 1e-4, "save_steps": 50},
        "seed": seed,
        "model": "base",
    }
    counts = {"rows": 1200, "rows_used": 1198, "tokens": 30861, "weighted": {"prompt": 9000, "completion": 12000}}
    metrics = Metrics(train_loss=0.25, steps=400, tokens=123456, seconds=75.5, data={"train": counts})
    inputs = {"model": base(), "train": Input(Path("rows.jsonl"), reference="rows.jsonl")}
    return Input(Path("none"), step, "sft", f"{step} {seed}", config, metrics, inputs, labels)


def dpo(step: str, start: Input) -> Input:
    """A model tuned on preferences, from `start`."""
    config = {"seed": 23, "model": start.step, "data": {"train": "pairs.jsonl", "rejected": "column"}, "train": {}}
    counts = {"train": {"rows": 300, "rows_bad": 0}}
    metrics = Metrics(train_loss=0.5, steps=100, tokens=54321, seconds=60.0, data=counts, reward_margin=0.125)  # type: ignore[call-arg]
    inputs = {"model": start, "train": Input(Path("pairs.jsonl"), reference="org/pairs@main")}
    return Input(Path("none"), step, "dpo", step, config, metrics, inputs)


def scores(model: str, source: Input, rows: list[ScoreRow], kind: str = "lm_eval") -> Input:
    """A step that scored the model `source`."""
    config = {"models": [model], "options": {"apply_chat_template": True, "limit": None}, "seed": 23}
    metrics = Metrics(
        results=rows,
        versions={"know": 1.0},
        num_fewshot={"know": 0},
        environment={"dtype": "float32", "lm_eval": "0.4.13"},
    )
    return Input(Path("none"), "", kind, "", config, metrics, {"model": source}, source.labels)


def report_inputs() -> dict[str, Input]:
    """Step -> its scores."""
    it, wit = sft("it", 0.0, 1.0), sft("wit", 0.2, 0.8)
    models = {"base": base(), "it": it, "wit": wit, "it_dpo": dpo("it_dpo", it), "dpo": dpo("dpo", wit)}
    values = {
        "base": (0.20, 0.10, 0.05, 5.0),
        "it": (0.60, 0.50, 0.40, 2.0),
        "wit": (0.61, 0.53, None, 1.5),
        "it_dpo": (0.65, 0.55, 0.42, 1.75),
        "dpo": (0.80, 0.90, 0.50, 1.25),
    }
    inputs = {}
    for name, (know, reason, held, posix) in values.items():
        rows = [row("know", know, 0.03), row("reason", reason, 0.04)]
        rows.append(row("know", held, held and 0.05, metric="acc_held", headline=False))
        rows.append(row("text", 10 * posix, 0.5, metric="perplexity", higher_is_better=False))
        inputs[f"bench[{name}]"] = scores(name, models[name], rows)
        sensitivity = row("wordings", posix, 0.1, metric="posix", higher_is_better=False)
        inputs[f"wordings[{name}]"] = scores(name, models[name], [sensitivity], "sensitivity")
    for (prompt, completion), by_seed in GRID.items():
        for seed, score in enumerate(by_seed, 1):
            labels = {"prompt": f"{prompt:g}", "completion": f"{completion:g}", "seed": str(seed)}
            model = replace(sft("cell", prompt, completion, seed), labels=labels)
            rows = [row("know", score, 0.03), row("reason", score - 0.05, 0.04)]
            cell = ",".join(f"{axis}={value}" for axis, value in labels.items())
            inputs[f"bench[cell,{cell}]"] = scores("cell", model, rows)
    return inputs
