"""The model card of a trained model: README.md in the hub's format, from the recipe and the training's metrics.

Two equal trainings have the same card, to the byte: it contains no times, no paths, no names of recipes or steps. The
card is published with the model, so its text cannot change without a new version of the stages.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.base import Context, Input
from stages.records.metrics import Metrics, ScoreRow
from stages.system.terminal_text import code_span, markdown_text
from stages.training.config import TrainingStage

CARD = "README.md"
CARD_TEMPLATE = Path(__file__).with_name("card.md.jinja")
LOCAL_NAME = "path/to/this/folder"  # the name of a model that is not on the hub
_RESULTS = ("train_loss", "eval_loss", "reward_margin", "reward_accuracy", "steps", "selected_step", "tokens")


def write_card(context: Context, metrics: Metrics) -> None:
    """Write the card of the model in context.out, with the metrics of its training."""
    model = Input(
        context.out, context.step, context.config.kind, "", context.config.model_dump(), metrics, context.inputs
    )
    (context.out / CARD).write_text(card(model), encoding="utf-8")


def card(model: Input, name: str = LOCAL_NAME, scores: Sequence[ScoreRow] = (), licence: str | None = None) -> str:
    """Return the card of a training's output, to be loaded by `name`, with the hub's identifier of its licence."""
    trainings, base = _history(model)
    scores = [row for row in scores if row.value is not None]
    titles = list(map(_title, trainings))
    data = ModelCardData(
        base_model=_hub_id(base.reference),
        datasets=_datasets(trainings),
        eval_results=[_eval_result(row) for row in scores] or None,
        library_name="transformers",
        license=licence,
        model_name=name.rpartition("/")[2] if scores else None,
        pipeline_tag="text-generation",
        tags=["weighted-instruction-tuning", *dict.fromkeys(str(training.kind) for training in trainings), "trl"],
    )
    return str(
        ModelCard.from_template(
            data,
            template_str=CARD_TEMPLATE.read_text(encoding="utf-8"),
            title=" and ".join(titles) if name == LOCAL_NAME else name.rpartition("/")[2],
            start=base.reference or "A model",
            titles=titles,
            name=name,
            is_chat_model=(model.path / "chat_template.jinja").is_file(),
            adapter=(model.path / "adapter").is_dir(),
            trainings=trainings,
            results=_RESULTS,
            weights=next((each.config["weights"] for each in trainings if each.config.get("weights")), None),
            scores=scores,
            section=_section,
            count_names=_count_names,
            cell=_cell,
            code_span=code_span,
            markdown_text=markdown_text,
        )
    )


def _history(model: Input) -> tuple[list[Input], Input]:
    """Return the outputs of the model's trainings, the first one first, and the model that they started from."""
    trainings: list[Input] = []
    while model.kind is not None:
        trainings.insert(0, model)
        model = model.inputs["model"]
    return trainings, model


def _title(training: Input) -> str:
    """`WIT (0.2, 0.8)`, `DPO`."""
    weights = training.config.get("weights")
    return f"WIT ({weights['prompt']:g}, {weights['completion']:g})" if weights else str(training.kind).upper()


def _count_names(training: Input) -> list[str]:
    """Names of the counts of its data."""
    splits = training.metrics.data.values()
    return list(dict.fromkeys(name for counts in splits for name, n in counts.items() if isinstance(n, int)))


def _section(training: Input) -> str:
    """The stage's recipe section as a block of YAML, with names of inputs instead of paths."""
    config: dict[str, Any] = {"kind": training.kind, **_plain(training.config)}
    for key in ("resources", *TrainingStage.fingerprint_exclude):
        *sections, name = key.split(".")
        (config.get(sections[0], {}) if sections else config).pop(name, None)
    if launch := config.get("launch"):  # its other options concern the machines, not the result
        config["launch"] = {"num_processes": launch["num_processes"]}
    inputs = training.inputs
    config["model"] = inputs["model"].reference or "the model before"
    config["data"] |= {name: inputs[name].reference for name in ("train", "eval") if name in inputs}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def _plain(value: Any) -> Any:
    """Drop settings that are not set, and all of an absolute path except its last part."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None and inner != {}}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _hub_id(reference: str) -> str | None:
    """Return `org/name` of a reference to the hub; None for any other."""
    name = reference.partition("#")[0].partition("@")[0]
    return name if name.count("/") == 1 and ":" not in name else None


def _datasets(trainings: list[Input]) -> list[str] | None:
    """Hub names of the training and evaluation data; None if there are none."""
    data = [t.inputs[name] for t in trainings for name in ("train", "eval") if name in t.inputs]
    return sorted({name for source in data if (name := _hub_id(source.reference))}) or None


def _eval_result(row: ScoreRow) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.task,
        dataset_name=row.task,
        metric_type=row.metric,
        metric_name=row.metric if row.filter in ("", "none") else f"{row.metric},{row.filter}",
        metric_value=row.value,
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
