"""AlpacaEval with the prompts, parsers and metrics of the package alpaca_eval, but this project's requests.

The package's own client saves nothing before it has 128 answers, counts a failed request as an empty answer and reads
its own list of endpoints. Its annotator accepts any function for completions: here, one that asks `Judge`. Only this
module uses the package; tests/stages/judge/test_alpaca_eval.py fails when an update changes what the module needs.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from stages.base import UserError
from stages.judge.config import AlpacaEval
from stages.judge.judge_client import Judge, Reply, text_of
from stages.judge.questions import Instruction
from stages.records.metrics import ScoreRow
from stages.system.library_versions import require_version

RESAMPLES = 1_000
"""Resamples of the instructions for the error of the length-controlled win rate."""

Annotation = dict[str, Any]
"""The package's row for one instruction. Its `preference` goes from 1 (the reference's output is better) to 2 (the
model's); it is None or NaN if no reply of the judge is readable."""

GENERATORS = {"generator_1": "the reference", "generator_2": "the evaluated model"}
"""The package's names of whose outputs are compared. Names of its own, or twice the same one, would change scores."""


def annotate(
    section: AlpacaEval, instructions: list[Instruction], outputs: Sequence[str], judge: Judge
) -> list[Annotation]:
    """Let the judge compare the model's outputs with the references. Raises UserError."""
    from alpaca_eval.annotators import PairwiseAnnotator

    require_version("alpaca_eval", "0.6")
    try:
        annotator = PairwiseAnnotator(annotators_config=section.annotator, caching_path=None)
        (single,) = annotator.annotators.values()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"alpaca_eval.annotator: {section.annotator!r} cannot be loaded: {error}") from None
    if single.batch_size != 1:
        raise UserError(f"alpaca_eval.annotator: {section.annotator!r} compares in batches; name another")
    single.fn_completions = _completions(single, judge)
    single.completion_key, single.fn_completion_parser = "completions_all", _verdict
    reference, model = GENERATORS.values()
    references = [asdict(item) | {"index": index, "generator": reference} for index, item in enumerate(instructions)]
    ours = [row | {"output": output, "generator": model} for row, output in zip(references, outputs, strict=True)]
    rows = annotator.annotate_head2head(outputs_1=references, outputs_2=ours, chunksize=None)
    by_index = {row["index"]: row | {"reply": row.get(annotator.completion_key)} for row in rows}
    return [by_index[index] for index in range(len(instructions))]


def _verdict(reply: dict[str, Any]) -> list[float]:
    """The verdict that `_completions` has read."""
    return [math.nan if reply["verdict"] is None else reply["verdict"]]


def _completions(single: Any, judge: Judge) -> Callable[..., dict[str, list[Any]]]:
    from alpaca_eval.utils import prompt_to_chatml

    parameters = {key: value for key, value in single.completions_kwargs.items() if key != "model_name"}
    read_reply, parser = single.completion_key == "completions_all", single.fn_completion_parser

    def as_package(reply: Reply) -> dict[str, Any]:
        return reply | {"text": text_of(reply), "total_tokens": 0}

    def parse(reply: Reply) -> Any:
        try:
            (value,) = parser(as_package(reply) if read_reply else text_of(reply))
        except (ValueError, AssertionError, KeyError, TypeError, IndexError):
            return None
        return None if value is None or math.isnan(value) else value

    def complete(prompts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        keys = [f"alpaca_eval {hashlib.sha256(prompt.encode()).hexdigest()}" for prompt in prompts]
        requests = {key: prompt_to_chatml(prompt.strip()) for key, prompt in zip(keys, prompts, strict=True)}
        judgements = judge.ask(requests, parse, **parameters)
        replies = [as_package(reply) | {"verdict": verdict} for reply, verdict in map(judgements.__getitem__, keys)]
        return {"completions": list(map(text_of, replies)), "completions_all": replies}

    return complete


def win_rate(annotation: Annotation) -> float | None:
    """The preference from 0 (the reference's output is better) to 1 (the model's); None if it is missing."""
    preference = annotation["preference"]
    if preference is None or math.isnan(preference):
        return None
    return preference - 1 if preference else 0.5  # the package's 0 is a draw


class Scores(NamedTuple):
    """The package's metrics as fractions, each instruction's length-controlled win rate, and metrics on resamples."""

    rows: list[ScoreRow]
    length_controlled: Sequence[float | None]
    resamples: dict[str, list[float]]
    """Metric -> its values on RESAMPLES resamples of the instructions."""


def score(
    section: AlpacaEval,
    annotations: list[Annotation],
    difficulties: Path | None,
    scratch: Path,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> Scores:
    """Compute the package's metrics. The error of the length-controlled win rate is that of fitting it to resamples.

    Its value for an instruction is fitted to all of them, so that the package's own error is too small, or even 0.

    Without the package's table `difficulties`, its smallest model controls for length alone. The controlled rates are
    None if the package cannot compute them: for fewer than five answers, or if all have one length.
    """
    import joblib
    import numpy as np
    import pandas as pd
    from alpaca_eval.metrics import get_winrate

    frame = pd.DataFrame(annotations).assign(**GENERATORS)
    glm = "length_controlled_v1" if difficulties else "length_controlled_minimal"
    if difficulties is None:
        difficulties = scratch / "df_gamed.csv"
        columns = {"model": "none", "index": range(frame["index"].max() + 1), "instruction_difficulty": 0.0}
        pd.DataFrame(columns).to_csv(difficulties, index=False)
    length_controlled: Sequence[float | None] = [None] * len(annotations)
    values: list[float] = []
    percent, fitted = fit_length_control(frame, glm, difficulties) or (get_winrate(frame), None)
    if fitted is not None:
        length_controlled = fitted
        rows = np.random.default_rng(seed).integers(0, len(frame), (RESAMPLES, len(frame)))
        lean = frame[["preference", "index", *GENERATORS]].copy()
        for name in ("output_1", "output_2"):
            lean[name] = [range(len(text)) for text in frame[name]]  # only the length of an output is used
        fits = joblib.Parallel(n_jobs=-1, return_as="generator")(
            joblib.delayed(fit_length_control)(lean.iloc[sample], glm, difficulties) for sample in rows
        )
        for number, fit in enumerate(fits, 1):
            progress(number, RESAMPLES, "alpaca_eval: resamples for the length-controlled win rate")
            values += [fit[0]["length_controlled_winrate"] / 100] if fit else []
    resamples = {"length_controlled_winrate": values} if len(values) == RESAMPLES else {}
    errors = {"length_controlled_winrate": float(np.std(values, ddof=1)) if resamples else None}
    if "standard_error" in percent:
        errors["win_rate"] = float(percent["standard_error"]) / 100
    metrics = sorted(("length_controlled_winrate", "win_rate"), key=lambda metric: metric != section.metric)
    return Scores(
        [
            ScoreRow(
                task="alpaca_eval",
                metric=metric,
                filter="none",
                value=float(percent[metric]) / 100 if metric in percent else None,
                stderr=errors.get(metric),
                n=sum(win_rate(annotation) is not None for annotation in annotations),
                headline=True,
                higher_is_better=True,
            )
            for metric in metrics
        ],
        length_controlled,
        resamples,
    )


def fit_length_control(frame: Any, glm: str, difficulties: Path) -> tuple[dict[str, float], list[float]] | None:
    """Return the package's metrics in percent, and the fitted win rate of each row; None if it cannot fit them."""
    import warnings

    from alpaca_eval.metrics import get_length_controlled_winrate, glm_winrate

    frame = frame.copy()
    # the package would download its own table, which is wrong for other instructions
    download = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(difficulties)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, about defaults
            percent = get_length_controlled_winrate(
                frame, glm_name=glm, save_weights_dir=None, is_warn_extreme_changes=False
            )
    except ValueError:
        return None
    finally:
        glm_winrate.hf_hub_download = download
    return percent, list(map(float, frame["glm_preference"]))
