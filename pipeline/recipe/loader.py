"""Recipe file -> Recipe: read, merge with `extends` and `--set`, interpolate, validate.

Every error names file, line, key and remedy. The config model of a stage's kind validates the stage's section.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.recipe.interpolation import Interpolator
from pipeline.recipe.matrix import Cell, MatrixReader, select_cells
from pipeline.recipe.nodes import BROKEN, Key, Node, Problem, RecipeError, dotted
from pipeline.recipe.recipe_files import apply_override, read_file
from pipeline.recipe.validation_messages import explain, references_of, suggest_word
from stages.base import BASE, Config, Need, StageConfig
from stages.kinds import KINDS
from stages.system.did_you_mean import did_you_mean
from stages.system.secrets import mask_secrets, secret_values

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
"""Names of recipes and stages. They become folder names: no slash, no leading dot, short enough for any file system."""
_NAME_RULE = "use a letter, then letters, digits, _ . -, at most 100 in all"

RESERVED_NAMES = ("store", "cache")
"""Folders next to those of the recipes."""
RESERVED_STAGE_NAMES = (BASE, "logs", "preview", "run.json")
"""The recipe's own model, and files next to the links to the stages' results."""


class Halving(Config):
    """Successive halving: selects the cells that train in full.

    All candidates first train for a small share of the stage's training. The best ones train for a larger share, and so
    on up to the full training (Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter
    Optimization*, 2016). pipeline.plan.search plans the steps.
    """

    stage: str
    """The training to shorten. Only the cells that reach the last rung train in full and are benchmarked."""
    over: list[str] = Field(default_factory=list)
    """The axes of the matrix to search; an empty list means all. Each combination of the other axes has its own
    search."""
    metric: str | None = None
    """The metric of the stage on data.eval that ranks the candidates. None: eval_completion_loss for sft, eval_loss
    for dpo."""
    factor: int = Field(default=4, ge=2, le=100)
    """Each rung keeps the best 1/factor of the candidates and trains them factor times as long."""
    rungs: int = Field(default=3, ge=2, le=10)
    """Number of training lengths, including the full one."""

    @property
    def lengths(self) -> list[Fraction]:
        """Share of the full training on each rung; the last is 1."""
        return [Fraction(1, self.factor**power) for power in reversed(range(self.rungs))]

    def survivors(self, candidates: int) -> int:
        """Return how many of `candidates` reach the next rung."""
        return max(1, math.ceil(candidates / self.factor))


class RecipeHead(Config):
    """The top-level keys of a recipe. The models of their kinds validate the stages."""

    name: str
    """Name of the folder with the run's results: letters, digits, '_', '.', '-'."""
    stages: dict[str, Any]
    """Stage name -> section with `kind` and the keys of that kind."""
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Seed of every stage that draws random numbers and has no seed of its own. The paper uses 23."""
    model: str | None = None
    """The base model: a hub id, a path relative to the recipe, or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX."""
    matrix: dict[str, Any] | None = None
    """Axes and their values, for a grid of cells; stages use the cell's value as ${matrix.AXIS}. `exclude` removes
    cells, `include` adds cells: both are lists of {AXIS: value}."""
    search: Halving | None = None
    """Train and benchmark only the best cells of the matrix, selected by successive halving, instead of all cells."""


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, or one cell of it if it has a matrix. Its references are not resolved yet."""

    name: str
    seed: int
    model: str | None
    stages: dict[str, StageConfig]
    source_map: Node
    problems: list[Problem] = field(default_factory=list)
    """Errors so far; planning adds its own and raises all together."""
    broken: Mapping[str, Sequence[Need]] = field(default_factory=dict)
    """Stages with errors, and `base` if the model is wrong -> the references that their sections still have. Stages
    that refer to them are not wrong for that."""
    labels: Mapping[str, str] = field(default_factory=dict)
    search: Halving | None = None
    axes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Stage, or `base` for the model -> the axes that its own section depends on."""

    def problem(self, key: Key, text: str) -> Problem:
        return Problem(self.source_map.locate_value(key), key, text)

    def error(self, key: Key, text: str) -> RecipeError:
        return RecipeError([], [self.problem(key, text)])


def load(path: Path, overrides: Sequence[str] = (), cells: Sequence[str] = ()) -> list[Recipe]:
    """Read the recipe at `path` and return one Recipe per cell; one if it has no matrix.

    Errors in single keys are in `problems` of the first Recipe. Raises RecipeError if it cannot be read at all.

    Args:
        path: a YAML file.
        overrides: `KEY=VALUE`, as after `--set`.
        cells: filters of the matrix, as after `--cells`; empty for all cells.
    """
    tree, problems = read_file(path)
    for override in overrides:
        tree = apply_override(tree, override, problems)
    secret_errors = [*_secret_errors(path.name, (), tree), *_secret_errors(tree.to_plain(), (), tree)]
    interpolator = Interpolator(tree)
    matrix = interpolator.resolve_matrix()
    matrix_reader = MatrixReader()
    all_cells = matrix_reader.read(matrix) if matrix else []
    selected = select_cells(all_cells, cells) if cells and not matrix_reader.problems else all_cells
    reader = _RecipeReader()
    recipes = [reader.read(interpolator.resolve_cell(cell), cell) for cell in selected or [Cell()]]
    if secret_errors := list(dict.fromkeys([*secret_errors, *reader.secret_errors])):
        raise RecipeError(secret_errors)
    recipes[0].problems.extend([*problems, *matrix_reader.problems, *interpolator.problems, *reader.problems])
    return recipes


def _secret_errors(value: Any, key: Key, tree: Node) -> Iterator[str]:
    """Yield an error for each key and value with a secret from the environment, because results record the recipe."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secret_errors(item, (*key, name), tree)
    texts = [str(name) for name in value] if isinstance(value, dict) else [str(value)]
    for name, secret in secret_values() if not isinstance(value, list) else ():
        if any(secret in text for text in texts):
            location = mask_secrets(f"{tree.locate_value(key)}: {dotted(key) or 'the recipe'}")
            yield f"{location}: contains the secret of the environment variable {name}; remove it"


class _RecipeReader:
    """Validates the cells of one recipe. A section that several cells share is validated once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.secret_errors: list[str] = []
        self._heads: dict[tuple[int, ...], tuple[Node, RecipeHead | None]] = {}
        self._stages: dict[tuple[str, int, int], tuple[Node, StageConfig | Sequence[Need]]] = {}
        """Stage, its section's id, seed -> the section, to keep its id in use, and its config or remaining needs."""

    def read(self, tree: Node, cell: Cell) -> Recipe:
        if tree.content is BROKEN:
            return Recipe("", 23, None, {}, tree, labels=cell.labels)
        top = {name: node.content for name, node in tree.content.items()}
        sections, model = top.get("stages"), top.get("model")
        head = self._read_head(tree)
        seed = head.seed if head else 23  # so that not every stage reports a wrong one
        stages: dict[str, StageConfig] = {}
        broken: dict[str, Sequence[Need]] = {}
        top_axes = {name: node.axes for name, node in tree.content.items()}
        axes = {BASE: top_axes.get("model", frozenset())}
        for name, section in sections.items() if isinstance(sections, dict) else ():
            key = (name, id(section), seed)
            if key not in self._stages:
                self._stages[key] = section, self._read_stage(name, section.to_plain(), seed, tree)
            config = self._stages[key][1]
            axes[name] = section.axes
            if isinstance(config, StageConfig):
                stages[name] = config
                if "seed" in type(config).model_fields and section.child("seed") is None:
                    axes[name] |= top_axes.get("seed", frozenset())
            else:
                broken[name] = config
        if not isinstance(model, str | None):
            broken[BASE] = ()
        return Recipe(
            name=str(top.get("name")),
            seed=seed,
            model=None if model is None else str(model),
            stages=stages,
            source_map=tree,
            broken=broken,
            labels=cell.labels,
            search=head.search if head else None,
            axes=axes,
        )

    def _read_head(self, tree: Node) -> RecipeHead | None:
        """Validate the top-level keys; of the stages only that they are a section and not empty."""
        key = tuple(id(node) for name, node in tree.content.items() if name != "stages")
        if key in self._heads:
            return self._heads[key][1]
        values = {name: node.to_plain() for name, node in tree.content.items() if name != "stages"}
        self.secret_errors += _secret_errors(values, (), tree)
        stages = None
        if "stages" in tree.content:
            stages = tree.content["stages"].content
            values["stages"] = {} if isinstance(stages, dict) else tree.content["stages"].to_plain()
            if stages == {}:
                self._report(tree, ("stages",), f"names no stage; the kinds are {', '.join(KINDS)}")
        head = None
        try:
            head = RecipeHead.model_validate(values)
            if not NAME.fullmatch(head.name) or head.name in RESERVED_NAMES:
                self._report(tree, ("name",), f"{head.name!r} is no folder name; {_NAME_RULE}")
            elif any(other.name != head.name for _, other in self._heads.values() if other):
                self._report(tree, ("name",), "is not the same for all cells of the matrix; one run has one name")
        except ValidationError as error:
            sections: dict[Key, type[Config]] = {(): RecipeHead}
            for name, node in stages.items() if isinstance(stages, dict) else ():
                if (kind := node.child("kind")) and str(kind.content) in KINDS:
                    sections["stages", name] = KINDS[str(kind.content)]
            self.problems += explain(error, values, (), tree, sections)
        self._heads[key] = tree, head
        return head

    def _read_stage(self, name: str, section: Any, seed: int, tree: Node) -> StageConfig | Sequence[Need]:
        """Return the stage's config; if it has errors, report them and return its remaining references."""
        key: Key = ("stages", name)
        self.secret_errors += _secret_errors(section, key, tree)
        if section is BROKEN:
            return ()
        if not NAME.fullmatch(name) or name in RESERVED_STAGE_NAMES:
            text = f"is no stage name; {_NAME_RULE}; {', '.join(RESERVED_STAGE_NAMES)} are reserved"
            self.problems.append(Problem(tree.nearest(key).key_location, key, text))
        if not isinstance(section, dict):
            self._report(tree, key, "a stage is a mapping with the key 'kind' and the keys of that kind")
            return ()
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            if "kind" not in section:
                typo = [name for name in section if did_you_mean(name, ["kind"])]
                text = "unknown key; did you mean 'kind'?" if typo else f"needs 'kind', one of {', '.join(KINDS)}"
                key = (*key, *typo)
                self.problems.append(Problem(tree.nearest(key).key_location, key, text))
            elif kind is not BROKEN:
                text = f"{kind!r} is unknown{suggest_word(str(kind), list(KINDS))}; the kinds are {', '.join(KINDS)}"
                self._report(tree, (*key, "kind"), text)
            return ()
        values = {name: value for name, value in section.items() if name != "kind"}
        if "seed" in KINDS[kind].model_fields:
            values.setdefault("seed", seed)
        try:
            return KINDS[kind].model_validate(values)
        except ValidationError as error:
            self.problems += explain(error, values, key, tree, {key: KINDS[kind], (): RecipeHead})
            return references_of(KINDS[kind], values, error)

    def _report(self, tree: Node, key: Key, text: str) -> None:
        self.problems.append(Problem(tree.locate_value(key), key, text))
