"""AlpacaEval through the package alpaca_eval: its prompt, its parser, its metrics; the requests are ours.

The package asks an endpoint itself, but keeps nothing until 128 answers are there, takes a failed request for an empty
answer and loads its own list of clients; so what it calls for completions is replaced, by a callable as it allows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages.base import UserError
from stages.judge.config import AlpacaEval
from stages.judge.endpoint import Choice, Judge
from stages.judge.questions import Instruction


def annotate(
    section: AlpacaEval, instructions: list[Instruction], said: Sequence[str], name: str, judge: Judge
) -> list[dict[str, Any]]:
    """The package's annotations, in the order of the instructions: both outputs, and `preference` from 1 (the
    reference's output is better) to 2 (the model's), None where the judge said nothing that can be read.

    Raises UserError.
    """
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.utils import prompt_to_chatml

    try:
        annotator = PairwiseAnnotator(annotators_config=section.annotator, caching_path=None)
        (single,) = annotator.annotators.values()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"alpaca_eval.annotator: {section.annotator!r} cannot be loaded by the package: {error}"
        ) from None
    if single.batch_size != 1:
        raise UserError(f"alpaca_eval.annotator: {section.annotator!r} compares several at once; name another")
    parameters = {key: value for key, value in single.completions_kwargs.items() if key != "model_name"}
    whole = single.completion_key == "completions_all"

    def parsed(choice: Choice) -> Any:
        try:
            (value,) = single.fn_completion_parser(_as_expected(choice) if whole else _text(choice))
        except (ValueError, AssertionError, KeyError, TypeError, IndexError):
            return None
        return None if value is None or math.isnan(value) else value

    def complete(prompts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        keys = [f"alpaca_eval {hashlib.sha256(prompt.encode()).hexdigest()}" for prompt in prompts]
        requests = {key: prompt_to_chatml(prompt.strip()) for key, prompt in zip(keys, prompts, strict=True)}
        found = judge.ask(requests, parsed, **parameters)
        choices = [found[key][0] for key in keys]
        return {"completions": [_text(each) for each in choices], "completions_all": list(map(_as_expected, choices))}

    single.fn_completions = complete
    shared = [{"instruction": each.instruction, "index": each.index} for each in instructions]
    theirs = [row | {"output": i.output, "generator": i.generator} for row, i in zip(shared, instructions, strict=True)]
    ours = [row | {"output": output, "generator": name} for row, output in zip(shared, said, strict=True)]
    annotated = annotator.annotate_head2head(outputs_1=theirs, outputs_2=ours, chunksize=None)
    found = {row["index"]: row for row in annotated}
    return [found[each.index] for each in instructions]


def metrics(section: AlpacaEval, annotated: list[dict[str, Any]], gamed: Path | None, scratch: Path) -> dict[str, Any]:
    """The package's metrics in per cent, with `glm_preference`, an item's win rate freed of length, in each annotation.

    Without `gamed`, the package's table of instructions' difficulty, its smallest model serves, of length alone. The
    length-controlled rate is None where the package finds none: answers all of one length, or fewer than five.
    """
    import pandas as pd
    from alpaca_eval.metrics import get_length_controlled_winrate, get_winrate

    frame = pd.DataFrame(annotated)
    table = gamed or _without_difficulties(frame["index"].max() + 1, scratch)
    model = "length_controlled_v1" if gamed else "length_controlled_minimal"
    with patch("alpaca_eval.metrics.glm_winrate.hf_hub_download", lambda **_: str(table)):
        try:
            found = get_length_controlled_winrate(frame, glm_name=model, save_weights_dir=None)
        except ValueError:
            return get_winrate(frame) | {"length_controlled_winrate": None, "lc_standard_error": None}
    for row, preference in zip(annotated, frame["glm_preference"], strict=True):
        row["glm_preference"] = float(preference)
    return found


def _without_difficulties(count: int, scratch: Path) -> Path:
    file = scratch / "df_gamed.csv"
    lines = [f"none,{i},0.0" for i in range(count)]
    file.write_text("\n".join(["model,index,instruction_difficulty", *lines]) + "\n")
    return file


def _text(choice: Choice) -> str:
    return choice["message"].get("content") or ""


def _as_expected(choice: Choice) -> Choice:
    """A choice as the package's own function returns it."""
    return choice | {"text": _text(choice), "total_tokens": 0}
