"""The model card of a trained model: README.md, in the hub's form, made of what the recipe says and of what the
training measured.

The card tells nothing that differs between two equal trainings: no times, no paths, no names of recipes or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.base import Context, Input
from stages.records.metrics import Metrics, ScoreRow
from stages.training.config import TrainingStage

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
HERE = "path/to/this/folder"
"""What a card calls a model that has no name yet."""
PAPER = (
    "Weighted instruction tuning gives the tokens of the prompt and of the completion a weight each in the loss:"
    " [Chatterjee et al., 2025](https://arxiv.org/abs/2507.07817)."
)
CITATION = """\
@article{chatterjee2025effect,
  title = {On the Effect of Instruction Tuning Loss on Generalization},
  author = {Chatterjee, Anwoy and Renduchintala, H S V N S Kowndinya and Bhatia, Sumit and Chakraborty, Tanmoy},
  journal = {Transactions of the Association for Computational Linguistics},
  year = {2025},
  eprint = {2507.07817},
  archivePrefix = {arXiv},
}"""
_SHOWN = ("train_loss", "eval_loss", "reward_margin", "reward_accuracy", "steps", "tokens")
"""Of a training's metrics, what the card has."""


@dataclass(frozen=True)
class Training:
    """One of the trainings that a model went through."""

    kind: str
    config: dict[str, Any]
    metrics: Metrics
    inputs: dict[str, Input]

    @property
    def title(self) -> str:
        """`WIT (0.2, 0.8)`, `DPO`."""
        weights = self.config.get("weights")
        return f"WIT ({weights['prompt']:g}, {weights['completion']:g})" if weights else self.kind.upper()

    @property
    def section(self) -> str:
        """The stage's section of the recipe as YAML, with the names of its inputs for where they lie."""
        config: dict[str, Any] = {"kind": self.kind, **_plain(self.config)}
        for key in ("resources", *TrainingStage.fingerprint_exclude):
            *above, last = key.split(".")
            (config.get(above[0], {}) if above else config).pop(last, None)
        if launch := config.get("launch"):  # the rest is of the machines
            config["launch"] = {"num_processes": launch["num_processes"]}
        config["model"] = self.inputs["model"].reference or "the model before"
        config["data"] |= {part: self.inputs[part].reference for part in ("train", "eval") if part in self.inputs}
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)

    @property
    def columns(self) -> list[str]:
        """What is counted of its data."""
        counts = self.metrics.data.values()
        return list(dict.fromkeys(name for each in counts for name, value in each.items() if isinstance(value, int)))

    @property
    def data(self) -> list[list[str]]:
        """For each part of its data, the name and the counts."""
        return [
            [f"{part}: `{self.inputs[part].reference}`", *(str(counts.get(name, "")) for name in self.columns)]
            for part, counts in self.metrics.data.items()
        ]

    @property
    def results(self) -> dict[str, str]:
        """What it came to."""
        values = self.metrics.to_json()
        found = {name: values[name] for name in _SHOWN if values.get(name) is not None}
        return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in found.items()}


def write_card(context: Context, metrics: Metrics) -> None:
    """Write the card of what a training stage leaves in context.out."""
    model = Input(
        context.out, context.step, context.config.kind, "", context.config.model_dump(), metrics, context.inputs
    )
    (context.out / CARD).write_text(card(model), encoding="utf-8")


def card(model: Input, name: str = HERE, scores: Sequence[ScoreRow] = (), licence: str | None = None) -> str:
    """The card's text.

    Args:
        model: what a training stage made.
        name: what the model is loaded by.
        scores: rows of an evaluation stage's `results`.
        licence: the hub's word for it, such as apache-2.0.
    """
    trainings, base = _history(model)
    scores = [row for row in scores if row.value is not None]
    titles = [training.title for training in trainings]
    data = ModelCardData(
        base_model=_hub_id(base.reference),
        datasets=sorted({found for t in trainings for p in ("train", "eval") if (found := _data_id(t, p))}) or None,
        eval_results=[_eval_result(row) for row in scores] or None,
        library_name="transformers",
        license=licence,
        model_name=name.rpartition("/")[2] if scores else None,
        pipeline_tag="text-generation",
        tags=["weighted-instruction-tuning", *dict.fromkeys(training.kind for training in trainings), "trl"],
    )
    return str(
        ModelCard.from_template(
            data,
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            title=" and ".join(titles) if name == HERE else name.rpartition("/")[2],
            summary=f"`{base.reference or 'A model'}`, trained by {', then by '.join(titles)}.{_weights(trainings)}",
            paper=PAPER,
            name=name,
            prompt=_prompt(model.path),
            adapter=(model.path / "adapter").is_dir(),
            trainings=trainings,
            scores=[[_cell(getattr(row, key)) for key in ("task", "metric", "value", "stderr", "n")] for row in scores],
            citation=CITATION,
        )
    )


def _history(model: Input) -> tuple[list[Training], Input]:
    """The trainings, the first one first, and what they began with."""
    trainings: list[Training] = []
    while model.kind is not None:
        trainings.insert(0, Training(model.kind, model.config, model.metrics, model.inputs))
        model = model.inputs["model"]
    return trainings, model


def _weights(trainings: list[Training]) -> str:
    """A sentence on the weights of the loss."""
    for weights in (training.config["weights"] for training in trainings if training.config.get("weights")):
        return f" A token of a prompt weighs {weights['prompt']:g}, one of a completion {weights['completion']:g}."
    return ""


def _plain(value: Any) -> Any:
    """Settings without those that are not set, and of paths of this machine only the last part."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None and inner != {}}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _hub_id(reference: str) -> str | None:
    """`org/name` of a reference to the hub; None for any other."""
    name = reference.partition("#")[0].partition("@")[0]
    return name if name.count("/") == 1 and ":" not in name else None


def _data_id(training: Training, part: str) -> str | None:
    return _hub_id(training.inputs[part].reference) if part in training.inputs else None


def _prompt(folder: Path) -> str:
    """A prompt as this model takes it, in Python."""
    template = (folder / "chat_template.jinja").is_file()
    return '[{"role": "user", "content": "Who are you?"}]' if template else '"Who are you?"'


def _eval_result(row: ScoreRow) -> EvalResult:
    """A row of scores as the hub's model-index has it."""
    metric = row.metric if row.filter in ("", "none") else f"{row.metric},{row.filter}"
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.task,
        dataset_name=row.task,
        metric_type=row.metric,
        metric_name=metric,
        metric_value=row.value,
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
