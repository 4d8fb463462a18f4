"""The schema and the reference page: up to date, and in agreement with the loader."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from docs.generator.json_schema import SCHEMA_FILE, text
from docs.generator.reference_page import PAGE, page
from pipeline.cli import main
from pipeline.recipe.loader import RecipeError, RecipeHead, load
from pipeline.recipe.yaml_reader import parse
from stages.kinds import KINDS
from stages.library_options.option_models import options
from tests.pipeline.recipe.test_loader import TEXT
from tests.pipeline.recipe.test_recipe_errors import CASES, GOOD
from tests.pipeline.recipe.test_recipe_fuzz import RECIPES as UNLIKE
from tests.pipeline.recipe.test_recipe_fuzz import any_values, odd_text

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "tasks" not in path.parts)
COPIES = 12
"""Mutated copies of each recipe."""
VALIDATOR = Draft7Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def values(recipe: str) -> Any:
    """Return the plain values of a recipe."""
    node, problems = parse(recipe, "r.yaml", Path())
    assert problems == []
    return node.to_plain()


def errors(recipe: str) -> list[str]:
    """Return the schema's errors in a recipe."""
    return [error.message for error in VALIDATOR.iter_errors(values(recipe))]


def test_the_schema_and_the_reference_are_up_to_date() -> None:
    """If this fails, run `make schema`."""
    assert SCHEMA_FILE.read_text(encoding="utf-8") == text()
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_schema_is_valid() -> None:
    Draft7Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_the_schema_and_fits_it(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()[:2]
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", "\n".join(lines), re.MULTILINE)
    assert (recipe.parent / named).resolve() == SCHEMA_FILE
    assert errors(recipe.read_text(encoding="utf-8")) == []


RIGHT = {
    "the good one": GOOD,
    "the one with anchors": TEXT,
    "whole numbers for numbers": GOOD.replace("0.2", "0").replace("0.8", "1"),
    "references": GOOD.replace("0.2", "'${stages.wit.weights.completion}'").replace("[{task: arc_easy}]", "'${a.b}'"),
    "a stage by reference": GOOD + "  again: ${stages.bench}\n",
    "a reference within a choice": GOOD.replace("epochs: 1", "epochs: 1, optim: 'adamw_${name}'"),
    "a placeholder": GOOD.replace("0.2", "'???'"),
    "a matrix": GOOD
    + "matrix: {p: [0, 0.5], d: {a: {x: 1}, b: 2}, exclude: [{p: 0, d: a}], include: [{p: 0.1, d: b}]}\n",
    "nulls": GOOD.replace("train: {num_train_epochs: 1}", "train: {max_length: null}\n    lora: null"),
    "extends another": "extends: r.yaml\nstages:\n  wit: {weights: {prompt: 1}, launch: {num_machines: 2}}\n",
    "with a kind, extends another": "extends: r.yaml\nstages:\n  wit: {kind: sft, weights: {prompt: 1}}\n",
    "no stages, extends another": "extends: r.yaml\nstages: {}\n",
    "runs by name": "name: r\nstages:\n  report: {kind: report, runs: [other, {run: third, model_name: x}]}\n",
    "a list of choices": GOOD.replace("{train: ./pairs.jsonl}", "{train: ./p.jsonl}\n    train: {loss_type: [ipo]}"),
    "choices and patterns": GOOD.replace("epochs: 1}", "epochs: 1}\n    lora: {init_lora_weights: pissa_niter_16}"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_recipes_fit(case: str) -> None:
    assert errors(RIGHT[case]) == []


BEYOND = {
    "unknown stage", "unknown model of a benchmark", "a stage that makes no model", "cycle", "missing data",
    "missing model", "folder that is no model", "no model at all", "unknown column", "column of preference rows alone",
    "column missing in the rows", "split of a file", "both weights 0", "reads the environment", "unknown interpolation",
    "placeholder", "same model twice", "evaluation without data", "losses and weights",
    "two precisions", "a report on what scores no model", "extends itself", "extends nothing",
    "a missing file in a folder", "a missing file without ./", "an environment variable", "an interpolated one",
    "a scheduler without what it needs", "an option that DPO cannot use", "an option without effect",
}  # fmt: skip
"""Errors beyond single keys: references, files, and keys that depend on each other."""
NOT_READ = {"not YAML", "weight is no number", "empty file"}
"""Recipes that cannot be parsed."""


@pytest.mark.parametrize("case", sorted(set(CASES) - BEYOND - NOT_READ))
def test_what_the_command_refuses_does_not_fit(case: str) -> None:
    """The cases of another test, which checks the command's messages."""
    before, after, _ = CASES[case]
    assert errors(GOOD.replace(before, after, 1))


@pytest.mark.parametrize("case", sorted(BEYOND))
def test_what_only_a_plan_can_find_fits(case: str) -> None:
    """The list above has no case that the schema refuses."""
    before, after, _ = CASES[case]
    assert errors(GOOD.replace(before, after, 1)) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes, without the files they refer to."""
    target = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", target, ignore=only_yaml, dirs_exist_ok=True)
    return target


def only_yaml(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".yaml")]


def test_the_schema_accepts_what_the_loader_accepts(folder: Path) -> None:
    """Copies of the real recipes with unusual values, some of which are valid."""
    admitted = 0
    for recipe, number in itertools.product(UNLIKE, range(COPIES)):
        copy, mutate = (folder / recipe).with_name("copy.yaml"), (any_values, odd_text)[number % 2]
        copy.write_bytes(mutate(random.Random(f"{recipe} {number}"), (folder / recipe).read_bytes()))
        with contextlib.suppress(RecipeError):
            if not load(copy)[0].problems:
                admitted += 1
                assert errors(copy.read_text(encoding="utf-8-sig")) == [], f"{recipe} {number}"
    assert admitted > len(UNLIKE), admitted


def test_the_reference_names_every_key_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    markdown = page()
    keys = [name for model in (RecipeHead, *KINDS.values()) for name in model.model_fields]
    keys += [name for library in ("SFTConfig", "DPOConfig", "launch") for name in options(library).model_fields]
    keys += [name for library in ("SFTConfig", "DPOConfig", "launch") for name in options(library).reserved]
    assert [name for name in keys if f"`{name}`" not in markdown] == []
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert [flag for flag in sorted(flags) if f"| `{flag}" not in markdown] == []


def test_the_links_of_the_reference_have_targets() -> None:
    markdown = page()
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", markdown)) <= anchors
    files = {link.partition("#")[0] for link in re.findall(r"\]\(([^#)][^)]*)\)", markdown) if "://" not in link}
    assert files
    assert all((PAGE.parent / file).is_file() for file in files)


def test_no_line_of_a_table_is_broken() -> None:
    """Each row has as many cells as the table's head."""
    width = 0
    for line in page().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not width or not cells or cells == width, line
        width = cells
