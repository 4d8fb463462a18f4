"""AlpacaEval over HTTP, compared with the package's own command for the same answers."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.base import Context, UserError
from stages.judge import alpaca_eval
from stages.judge.config import AlpacaEval
from stages.judge.stage import run
from stages.records.metrics import Metrics, ScoreRow
from tests.stages.judge.conftest import ALPACA_EVAL, INSTRUCTIONS
from tests.stages.judge.server import KEY, Answer, serving

Step = Callable[..., Context]
LIKES = {
    f"Say {word}.": share
    for word, share in zip(
        ["one", "two", "three", "four", "five", "six", "seven"], [0.9, 0.2, 0.5, 0.7, 0.35, 0.6, 0.05], strict=True
    )
}
"""Instruction -> the judge's preference for the model's output, from 0 to 1."""


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_eval, "RESAMPLES", 12)


def instruction_of(request: dict[str, Any]) -> str:
    return re.search(r'"instruction": """(.*?)"""', request["messages"][1]["content"], re.DOTALL)[1]  # type: ignore[index]


def prefers(request: dict[str, Any]) -> dict[str, Any]:
    """The first token's probabilities: m and M name the first and second output, in random order."""
    prompt = request["messages"][1]["content"]
    share = LIKES[instruction_of(request)]
    outputs = re.findall(r'"output": """(.*?)"""', prompt, re.DOTALL)
    reference = next(row["output"] for row in INSTRUCTIONS if row["instruction"] == instruction_of(request))
    ours_is_first = outputs[1] == reference
    chances = {"m": share if ours_is_first else 1 - share, "M": 1 - share if ours_is_first else share}
    top = [{"token": token, "bytes": None, "logprob": math.log(chance)} for token, chance in chances.items()]
    token = max(chances, key=lambda name: chances[name])
    content = [{"token": token, "bytes": None, "logprob": math.log(chances[token]), "top_logprobs": top}]
    return {"message": {"role": "assistant", "content": token}, "logprobs": {"content": content, "refusal": None}}


def by_metric(metrics: Metrics) -> dict[str, ScoreRow]:
    return {row.metric: row for row in metrics.results or []}


def test_the_win_rate_is_the_mean_preference(step: Step) -> None:
    with serving(prefers) as server:
        context = step(server.url, alpaca_eval=ALPACA_EVAL)
        metrics = run(context)
    rows = by_metric(metrics)
    shares = list(LIKES.values())
    assert rows["win_rate"].value == pytest.approx(statistics.fmean(shares))
    assert rows["win_rate"].stderr == pytest.approx(statistics.stdev(shares) / len(shares) ** 0.5)
    assert [name for name, row in rows.items() if row.headline] == ["length_controlled_winrate", "win_rate"]
    samples = [json.loads(line) for line in (context.out / "samples_alpaca_eval.jsonl").open()]
    assert [sample["win_rate"] for sample in samples] == pytest.approx(shares)
    controlled = [sample["length_controlled_winrate"] for sample in samples]
    assert statistics.fmean(controlled) == pytest.approx(rows["length_controlled_winrate"].value)
    assert rows["length"].value == statistics.fmean(len(sample["responses"][0]) for sample in samples)
    orders = Counter(
        re.findall(r'"output": """(.*?)"""', request["messages"][1]["content"], re.DOTALL)[1]
        in {row["output"] for row in INSTRUCTIONS}
        for request in server.requests
    )
    assert set(orders) == {True, False}, "the order of the outputs is random"


@pytest.mark.parametrize("difficulties", [False, True])
def test_scores_equal_the_package(
    step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difficulties: bool
) -> None:
    """The function of its command compares the same outputs through the same server."""
    gamed = tmp_path / "df_gamed.csv"
    lines = [
        f"short,{i},{(-1) ** i * 0.3 * i},{1 + share / 2},{share - 0.5},False" for i, share in enumerate(LIKES.values())
    ]
    head = "model,index,instruction_difficulty,preference,std_delta_len,not_gamed_baseline"
    gamed.write_text("\n".join([head, *lines]) + "\n")
    with serving(prefers) as server:
        section = ALPACA_EVAL | ({"length_control": "df_gamed.csv"} if difficulties else {})
        context = step(server.url, alpaca_eval=section)
        rows = by_metric(run(context))
        samples = [json.loads(line) for line in (context.out / "samples_alpaca_eval.jsonl").open()]

        import alpaca_eval as package
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
        monkeypatch.setattr(package.constants, "OPENAI_API_KEYS", [KEY])
        annotator = package.constants.EVALUATORS_CONFIG_DIR / "weighted_alpaca_eval_gpt4_turbo" / "configs.yaml"
        config = yaml.safe_load(annotator.read_text())
        (settings,) = config.values()
        settings["completions_kwargs"] |= {"model_name": "gpt-judge", "openai_api_base": server.url}
        settings["completions_kwargs"] |= {
            "openai_api_keys": [KEY],
            "requires_chatml": True,
            "client_config_path": "none",
        }
        settings["prompt_template"] = str(annotator.parents[1] / settings["prompt_template"])
        (tmp_path / "configs.yaml").write_text(yaml.safe_dump(config))
        leaderboard, _ = package.evaluate(
            model_outputs=[
                {"instruction": sample["prompts"][0], "output": sample["responses"][0], "generator": "wit", "index": i}
                for i, sample in enumerate(samples)
            ],
            reference_outputs=[row | {"index": i} for i, row in enumerate(INSTRUCTIONS)],
            annotators_config=str(tmp_path / "configs.yaml"),
            precomputed_leaderboard=None,
            output_path=None,
            is_return_instead_of_print=True,
            caching_path=None,
            metric_kwargs={
                "glm_name": "length_controlled_v1" if difficulties else "length_controlled_minimal",
                "save_weights_dir": None,
            },
        )
    expected = leaderboard.loc["wit"]
    assert rows["win_rate"].value == pytest.approx(expected["win_rate"] / 100)
    assert rows["win_rate"].stderr == pytest.approx(expected["standard_error"] / 100)
    controlled = rows["length_controlled_winrate"]
    assert controlled.value == pytest.approx(expected["length_controlled_winrate"] / 100)
    assert controlled.value != rows["win_rate"].value
    resamples = json.loads((context.out / "resamples_alpaca_eval.json").read_text())["values"]
    assert controlled.stderr == statistics.stdev(resamples["length_controlled_winrate"])


def test_an_unreadable_preference_is_requested_again_then_counted(step: Step) -> None:
    tries: Counter[str] = Counter()

    def reply(request: dict[str, Any]) -> Answer:
        instruction = instruction_of(request)
        tries[instruction] += 1
        if instruction == "Say two." or (instruction == "Say one." and tries[instruction] == 1):
            return "Neither."
        return prefers(request)

    with serving(reply) as server:
        metrics = run(step(server.url, alpaca_eval=ALPACA_EVAL, options={"attempts": 2}))
    assert (tries["Say one."], tries["Say two."], tries["Say three."]) == (2, 2, 1)
    read = [share for word, share in LIKES.items() if word != "Say two."]
    assert by_metric(metrics)["win_rate"].value == pytest.approx(statistics.fmean(read))
    assert metrics.notes == [
        "alpaca_eval: 1 of 7 judgements could not be read after 2 attempts; the scores are of the other 6"
    ]
    with serving(lambda _: "no") as server, pytest.raises(UserError, match="none of the 7 judgements of gpt-judge"):
        run(step(server.url, alpaca_eval=ALPACA_EVAL, options={"attempts": 1}))


def test_the_names_in_the_file_are_the_user_s(step: Step, tmp_path: Path) -> None:
    """The package takes a model whose name is that of the reference for the reference, with a win rate of 50."""
    with serving(prefers) as server:
        expected = run(step(server.url, alpaca_eval=ALPACA_EVAL))
        for name in ("wit", *alpaca_eval.GENERATORS.values()):
            rows = [row | {"generator": name} for row in INSTRUCTIONS]
            (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            assert run(step(server.url, alpaca_eval={"instructions": "named.jsonl"})).results == expected.results


def test_a_draw_is_half_a_win() -> None:
    """The package's parsers of rankings write 0 for a draw."""
    assert [alpaca_eval.win_rate({"preference": value}) for value in (1, 2, 1.25, 0, None, math.nan)] == [
        *(0, 1, 0.25, 0.5, None, None)
    ]


def test_a_refusal_is_no_preference(step: Step) -> None:
    """A verdict of one token is always cut at its limit, which is no reason not to read it."""

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        reason = "content_filter" if instruction_of(request) == "Say two." else "length"
        return prefers(request) | {"finish_reason": reason}

    with serving(reply) as server:
        rows = by_metric(run(step(server.url, alpaca_eval=ALPACA_EVAL)))
    read = [share for word, share in LIKES.items() if word != "Say two."]
    assert rows["win_rate"].value == pytest.approx(statistics.fmean(read))
    assert rows["win_rate"].n == 6


def test_the_controlled_rate_s_error_is_that_of_sampling_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that throws a fair coin whatever the lengths: the controlled rate varies as the mean of the coins.

    The package fits one intercept, so that all fitted rates are equal and its own error is 0.
    """
    monkeypatch.setattr(alpaca_eval, "RESAMPLES", 200)
    draw = random.Random(3)
    annotations = [
        {
            "index": i,
            "preference": draw.choice([1.02, 1.98]),
            "output_1": "x" * draw.randint(5, 50),
            "output_2": "y" * 20,
        }
        for i in range(150)
    ]
    seen: list[tuple[int, int, str]] = []
    scores = alpaca_eval.score(alpaca_config(), annotations, None, tmp_path, 7, lambda *state: seen.append(state))
    rates = [row["preference"] - 1 for row in annotations]
    error = statistics.stdev(rates) / 150**0.5
    by_name = {row.metric: row for row in scores.rows}
    assert statistics.pstdev(scores.length_controlled) < 1e-9
    assert by_name["length_controlled_winrate"].value == pytest.approx(statistics.fmean(rates), abs=0.02)
    assert by_name["length_controlled_winrate"].stderr == pytest.approx(error, rel=0.15)
    assert by_name["win_rate"].stderr == pytest.approx(error)
    assert seen[-1][:2] == (200, 200)
    again = alpaca_eval.score(alpaca_config(), annotations, None, tmp_path, 7, lambda *_: None)
    assert again.resamples == scores.resamples


def alpaca_config() -> AlpacaEval:
    return AlpacaEval(instructions="instructions.jsonl")


def test_an_interrupted_step_pays_for_nothing_twice(step: Step) -> None:
    refused = True

    def reply(request: dict[str, Any]) -> Answer:
        return 400 if refused and instruction_of(request) == "Say six." else prefers(request)

    with serving(reply) as server:
        context = step(server.url, alpaca_eval=ALPACA_EVAL, options={"concurrency": 1})
        with pytest.raises(UserError, match="answers 400"):
            run(context)
        first, refused = [instruction_of(request) for request in server.requests], False
        server.requests.clear()
        again = by_metric(run(replace(context, scratch=context.scratch)))
    assert len(first) > 1
    second = [instruction_of(request) for request in server.requests]
    assert not {*second} & ({*first} - {"Say six."})
    assert len(second) + len(first) == 8, "the refused request comes twice"
    assert again["win_rate"].value == pytest.approx(statistics.fmean(LIKES.values()))


def test_an_unknown_annotator(step: Step) -> None:
    with serving(prefers) as server, pytest.raises(UserError, match=r"alpaca_eval\.annotator: 'gone' cannot be loaded"):
        run(step(server.url, alpaca_eval=ALPACA_EVAL | {"annotator": "gone"}))
