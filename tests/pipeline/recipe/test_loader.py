"""Loading a recipe: merging, overrides, interpolation, and the location of each value."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe.loader import Recipe, load
from pipeline.recipe.nodes import Key

TEXT = """\
name: small
seed: 7
model: ./model
stages:
  wit:
    kind: sft
    data: &rows
      train: ./rows.jsonl
    weights: {prompt: 0.2, completion: 0.8}
    train: &how {max_steps: 3, learning_rate: 1e-3}
  it:
    kind: sft
    data: *rows
    weights: {prompt: 0, completion: 1}
    train: {<<: *how, max_steps: 4}
  bench:
    kind: lm_eval
    models: [base, wit]
    tasks:
      - task: arc_easy
"""


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    """Load the recipe `text`, which must have no problems."""
    (folder / "r.yaml").write_bytes(text.encode())
    (recipe,) = load(folder / "r.yaml", overrides)
    assert [str(problem) for problem in recipe.problems] == []
    return recipe


def place(recipe: Recipe, *key: str | int) -> tuple[int | None, int | None]:
    location = recipe.source_map.locate_value(key)
    return location.line, location.column


def value(recipe: Recipe, *key: str | int) -> object:
    return recipe.source_map.nearest(key).to_plain()


PLACES: dict[Key, tuple[int, int]] = {
    ("model",): (3, 8),
    ("stages", "wit"): (5, 3),  # the section begins in the next line, so the key is reported
    ("stages", "wit", "data", "train"): (8, 14),
    ("stages", "wit", "weights", "completion"): (9, 40),
    ("stages", "it", "data"): (13, 11),
    ("stages", "it", "data", "train"): (8, 14),
    ("stages", "it", "train", "max_steps"): (15, 34),
    ("stages", "it", "train", "learning_rate"): (10, 47),
    ("stages", "bench", "models", 1): (18, 20),
    ("stages", "bench", "tasks", 0, "task"): (20, 15),
    ("stages", "bench", "tasks", 0, "metric"): (20, 9),  # absent: the start of its section
}


@pytest.mark.parametrize("begin", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_every_value_has_its_location(tmp_path: Path, begin: str, end: str) -> None:
    recipe = read(tmp_path, begin + TEXT.replace("\n", end))
    assert {key: place(recipe, *key) for key in PLACES} == PLACES
    assert recipe.stages["it"].model_dump()["train"] == {"max_steps": 4, "learning_rate": 0.001}


def test_an_override_changes_one_value_and_no_alias(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEXT, "stages.wit.data.train=./other.jsonl", "stages.bench.models.1=it", "seed=8")
    assert value(recipe, "stages", "wit", "data", "train") == "./other.jsonl"
    assert value(recipe, "stages", "it", "data", "train") == "./rows.jsonl"
    assert value(recipe, "stages", "bench", "models") == ["base", "it"]
    assert (recipe.seed, recipe.stages["wit"].model_dump()["seed"]) == (8, 8)
    assert str(recipe.source_map.locate_value(("seed",))) == "--set seed=8"
    assert recipe.source_map.locate_value(("stages", "wit", "data", "train")).folder == Path.cwd()
    assert recipe.source_map.locate_value(("stages", "it", "data", "train")).folder == tmp_path


def test_an_override_by_a_section_is_merged(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEXT, "stages.wit.weights={prompt: 0.4}", "stages.wit.lora={r: 4}")
    assert value(recipe, "stages", "wit", "weights") == {"prompt": 0.4, "completion": 0.8}
    assert value(recipe, "stages", "wit", "lora") == {"r": 4}


def test_a_recipe_is_merged_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text(TEXT)
    recipe = read(tmp_path, "extends: below/base.yaml\nname: other\nstages:\n  wit: {weights: {prompt: 1}}\n")
    assert (recipe.name, recipe.seed, list(recipe.stages)) == ("other", 7, ["wit", "it", "bench"])
    assert value(recipe, "stages", "wit", "weights") == {"prompt": 1, "completion": 0.8}
    assert str(recipe.source_map.locate_value(("stages", "wit", "weights", "prompt"))) == f"{tmp_path}/r.yaml:4:27"
    assert recipe.source_map.locate_value(("model",)).folder == tmp_path / "below"


REFERENCES = {
    "a number": ("${stages.wit.weights.prompt}", 0.2),
    "a text with several": ("'${name}-${seed}-${stages.wit.weights.prompt}'", "small-7-0.2"),
    "an item of a list": ("${stages.bench.models.1}", "wit"),
    "a section": ("${stages.it.train}", {"max_steps": 4, "learning_rate": 0.001}),
    "through another": ("${stages.far.train.max_steps}", 3),
    "none": (r"'\${name} $name {name}'", "${name} $name {name}"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_interpolations_become_values(tmp_path: Path, case: str) -> None:
    written, expected = REFERENCES[case]
    (tmp_path / "r.yaml").write_text(f"{TEXT}  far: {{train: '${{stages.wit.train}}'}}\n  near: {written}\n")
    (recipe,) = load(tmp_path / "r.yaml")
    assert value(recipe, "stages", "near") == expected
    assert place(recipe, "stages", "near") == (22, 9)


WRONG = {
    "unknown": ("${stages.wot.x}", "21:6: stages.x: '${stages.wot.x}': there is no stages.wot; did you mean 'wit'?"),
    "to itself": ("${stages.x}", "21:6: stages.x: refers to itself: stages.x -> stages.x"),
    "in a circle": ("${stages.y}", "22:6: stages.y: refers to itself: stages.x -> stages.y -> stages.x"),
    "to what holds it": ("${stages}", "21:6: stages.x: refers to itself: stages -> stages.x -> stages"),
    "not closed": (
        "'${name'",
        "21:6: stages.x: '${' is not closed by '}'; write \\${ for the two characters themselves",
    ),
    "a section in a text": ("'a${stages.wit}'", "21:6: stages.x: '${stages.wit}' is a section or list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_interpolation_is_reported_once_at_its_location(tmp_path: Path, case: str) -> None:
    written, expected = WRONG[case]
    (tmp_path / "r.yaml").write_text(f"{TEXT}  x: {written}\n  y: '${{stages.x}}'\n")
    (recipe,) = load(tmp_path / "r.yaml")
    problems = [str(problem) for problem in recipe.problems]
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path}/r.yaml:{expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[("0", 0), ("0o7", 7), ("0x3A", 58), ("-19", -19), ("+3", 3)],
        *[("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0), ("1e-3", 0.001)],
        *[(text, text) for text in ("042", "-007", "1:30", "12:30:45", "1_000", "0b11", "0o8", "1e", "2024-01-02")],
        *[(text, text) for text in ("on", "off", "yes", "no", "y", "N", "On", "tRue", "nULL", "=", "<", "0x", "1.2.3")],
        *[("'5'", "5"), ("!!str 5", "5"), ("!!int 5", 5), ("!!float 5", 5.0)],
    ],
)
def test_plain_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, expected: object) -> None:
    """The examples of YAML 1.2.2, section 10.3.2, and what YAML 1.1 read otherwise."""
    gen_kwargs = f"options: {{gen_kwargs: {{until: [{text}]}}}}" if text else "options: {gen_kwargs: {until: [null]}}"
    recipe = read(tmp_path, TEXT + f"    {gen_kwargs}\n")
    read_value = recipe.source_map.nearest(("stages", "bench", "options", "gen_kwargs", "until", 0)).to_plain()
    assert read_value == expected
    assert type(read_value) is type(expected)


def test_an_override_of_a_named_axis_replaces_it(tmp_path: Path) -> None:
    """As it does an axis that is a list. The axes beside it stay."""
    matrix = "matrix: {rate: {low: 1e-5, high: 1e-4}, prompt: [0, 1]}\n"
    (tmp_path / "r.yaml").write_text(TEXT + matrix)
    for override in ("matrix.rate={top: 1e-3}", "matrix={rate: {top: 1e-3}}"):
        recipes = load(tmp_path / "r.yaml", [override])
        assert [dict(recipe.labels) for recipe in recipes] == [
            {"rate": "top", "prompt": "0"},
            {"rate": "top", "prompt": "1"},
        ]
    (tmp_path / "more.yaml").write_text("extends: r.yaml\nmatrix: {rate: {top: 1e-3}}\n")
    assert {recipe.labels["rate"] for recipe in load(tmp_path / "more.yaml", [])} == {"top"}
    recipes = load(tmp_path / "r.yaml", ["matrix.rate.top=1e-3"])
    assert {recipe.labels["rate"] for recipe in recipes} == {"low", "high", "top"}
