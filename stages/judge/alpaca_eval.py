"""AlpacaEval with the prompts, parsers and metrics of the package alpaca_eval, but this project's requests.

The package's own client saves nothing before it has 128 answers, counts a failed request as an empty answer and reads
its own list of endpoints. Its annotator accepts any function for completions: here, one that asks `Judge`. Only this
module uses the package; tests/stages/judge/test_alpaca_eval.py fails when an update changes what the module needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.base import UserError
from stages.judge.config import AlpacaEval
from stages.judge.judge_client import Judge, Reply, text_of
from stages.judge.questions import Instruction
from stages.records.metrics import ScoreRow
from stages.system.library_versions import require_version

Annotation = dict[str, Any]
"""The package's row for one instruction. Its `preference` goes from 1 (the reference's output is better) to 2 (the
model's); it is None or NaN if no reply of the judge is readable."""


def annotate(
    section: AlpacaEval, instructions: list[Instruction], outputs: Sequence[str], name: str, judge: Judge
) -> list[Annotation]:
    """Let the judge compare the outputs of the model `name` with the references. Raises UserError."""
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
    references = [asdict(item) | {"index": index} for index, item in enumerate(instructions)]
    ours = [row | {"output": output, "generator": name} for row, output in zip(references, outputs, strict=True)]
    rows = annotator.annotate_head2head(outputs_1=references, outputs_2=ours, chunksize=None)
    by_index = {row["index"]: row for row in rows}
    return [by_index[index] for index in range(len(instructions))]


def _completions(single: Any, judge: Judge) -> Callable[..., dict[str, list[Any]]]:
    from alpaca_eval.utils import prompt_to_chatml

    parameters = {key: value for key, value in single.completions_kwargs.items() if key != "model_name"}

    def as_package(reply: Reply) -> dict[str, Any]:
        return reply | {"text": text_of(reply), "total_tokens": 0}

    def parse(reply: Reply) -> Any:
        completion = as_package(reply) if single.completion_key == "completions_all" else text_of(reply)
        try:
            (value,) = single.fn_completion_parser(completion)
        except (ValueError, AssertionError, KeyError, TypeError, IndexError):
            return None
        return None if value is None or math.isnan(value) else value

    def complete(prompts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        keys = [f"alpaca_eval {hashlib.sha256(prompt.encode()).hexdigest()}" for prompt in prompts]
        requests = {key: prompt_to_chatml(prompt.strip()) for key, prompt in zip(keys, prompts, strict=True)}
        judgements = judge.ask(requests, parse, **parameters)
        replies = [judgements[key][0] for key in keys]
        return {"completions": list(map(text_of, replies)), "completions_all": list(map(as_package, replies))}

    return complete


def win_rate(annotation: Annotation) -> float | None:
    """The preference from 0 (the reference's output is better) to 1 (the model's); None if it is missing."""
    preference = annotation["preference"]
    return None if preference is None or math.isnan(preference) else preference - 1


def score(
    section: AlpacaEval, annotations: list[Annotation], difficulties: Path | None, scratch: Path
) -> tuple[list[ScoreRow], list[float | None]]:
    """Compute the package's metrics as fractions, and each instruction's length-controlled win rate.

    Without the package's table `difficulties`, its smallest model controls for length alone. The controlled rates are
    None if the package cannot compute them: for fewer than five answers, or if all have one length.
    """
    import pandas as pd
    from alpaca_eval.metrics import get_length_controlled_winrate, get_winrate, glm_winrate

    frame = pd.DataFrame(annotations)
    model = "length_controlled_v1" if difficulties else "length_controlled_minimal"
    length_controlled: list[float | None] = [None] * len(annotations)
    if difficulties is None:
        difficulties = scratch / "df_gamed.csv"
        columns = {"model": "none", "index": range(frame["index"].max() + 1), "instruction_difficulty": 0.0}
        pd.DataFrame(columns).to_csv(difficulties, index=False)
    # the package would download its own table, which is wrong for other instructions
    download = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(difficulties)
    try:
        percent = get_length_controlled_winrate(frame, glm_name=model, save_weights_dir=None)
        length_controlled = list(map(float, frame["glm_preference"]))
    except ValueError:
        percent = get_winrate(frame)
    finally:
        glm_winrate.hf_hub_download = download
    rows = [
        ScoreRow(
            task="alpaca_eval",
            metric=metric,
            filter="none",
            value=float(percent[metric]) / 100 if metric in percent else None,
            stderr=float(percent[error]) / 100 if metric in percent else None,
            n=sum(win_rate(annotation) is not None for annotation in annotations),
            headline=metric == section.metric,
            higher_is_better=True,
        )
        for metric, error in (("win_rate", "standard_error"), ("length_controlled_winrate", "lc_standard_error"))
    ]
    return rows, length_controlled
