"""The small protocol every stage kind keeps: a config model, named inputs, run(context) -> metrics.

Light by intent: imports no torch, so that a recipe can be read and planned in a moment. What a stage does when it
runs lives in its package's `stage.py`, imported only by the worker process that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from stages.records.metrics import Metrics

BASE = "base"
"""The name under which stages refer to the recipe's own model."""


class UserError(Exception):
    """What a user can mend: a wrong data row, an impossible option. The message says place, cause and remedy.

    `key` is the place where it is in the stage's own section, `tasks.0.task`; the pipeline adds file and line.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


AT_KEY = "at_key"
"""The type of the errors that `wrong_at` makes."""


def wrong_at(key: str, message: str) -> PydanticCustomError:
    """What a validator of a whole section raises when one of its keys, `key`, is to blame."""
    return PydanticCustomError(AT_KEY, "{message}", {"message": message, "key": key})


class Config(BaseModel):
    """A part of a recipe: unknown keys are errors, nothing is converted (a string is no number), nothing changes
    after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Need:
    """Something a stage reads: another stage's result, or a file or folder found by reference."""

    kind: Literal["model", "data", "steps", "run"]
    """`model`: a stage's name, `base`, or a reference to a model; `data`: a reference to a file or folder;
    `steps`: the results of every step of the stage that `value` names, or of all that make scores for `*`;
    `run`: the name of a recipe, for what its last run left in the folder given by --runs, if anything."""
    value: str
    """The text in the recipe."""
    key: str
    """Where it stands in the stage's section, dotted: `data.train`, `tasks.0.data.test`."""
    code: bool = False
    """Whether a model is fetched with its own Python files; without, they stay on the hub."""
    optional: bool = False
    """Whether `*` may stand for nothing."""
    of: str = ""
    """Of `steps`: the name of another need, a model; only the steps that scored it are meant."""


_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Resources(Config):
    """What a step takes of a machine while it runs: it starts where and when so much is free."""

    gpus: int | None = Field(default=None, ge=0)
    """None: one for each of its processes, where there are GPUs."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores. None: an equal share of one machine; on a cluster one for each of its processes."""
    memory: str | None = Field(default=None, pattern=r"^\d+(\.\d+)?(MiB|GiB|TiB)$")
    """Of the machine, not of a GPU, such as 64GiB. None: it is not counted."""

    @property
    def bytes(self) -> int:
        """`memory` as a number; 0 where it is not counted."""
        return int(float(self.memory[:-3]) * _UNITS[self.memory[-3:]]) if self.memory else 0


Ability = Literal["run", "preview", "estimate", "fetch"]
"""What a kind of stage does in a process of its own. Each is a function of that name in a module of the kind's package:
`run` in stage.py, which every kind has, the others in preview.py, estimate.py and fetch.py, where there is such a file.

    run(context: Context) -> Metrics                          run a step
    preview(step, config, paths, count) -> (dict, str, Any)   show `count` rows: JSON, an HTML page, a rich renderable
    estimate(config, given) -> Estimate                       see stages/estimate/result.py
    fetch(config, paths, scratch) -> list[str]                download what no key names, one line for each download

`paths` holds the path of each input; for a model that does not exist yet, that of the model its training starts from.
"""


class StageConfig(Config):
    """One stage of a recipe. Subclasses add their fields and say what they need."""

    kind: ClassVar[str]
    """The word after `kind:` in a recipe."""
    output_kind: ClassVar[Literal["model", "scores", "report", "record"]]
    """What its steps publish: a model that others may start from, scores of one, a report on scores, or a mere record
    of what was done elsewhere."""
    version: ClassVar[int]
    """Raised when the same settings would give another result, so that older results are made again."""
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that change how a result is made, never what it is: no part of a fingerprint."""
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {}
    """Metrics on its own evaluation data by which a search may choose among cells, the first by default, with which
    value is best; none where a stage cannot be searched over."""
    cost_invariant: ClassVar[tuple[str, ...]] = ("seed",)
    """Dotted keys that change nothing of that: steps that differ in no other are estimated once."""
    writes_to: ClassVar[str | None] = None
    """The key that names what each of its steps writes elsewhere, such as a repository: no two may name the same."""

    resources: Resources = Resources()
    """What each of its steps takes of a machine; no part of a fingerprint."""

    @classmethod
    def has(cls, ability: Ability) -> bool:
        """Whether stages of this kind have the ability. Imports the kind's package, not the module."""
        return find_spec(cls._module(ability)) is not None

    @classmethod
    def load(cls, ability: Ability) -> Callable[..., Any]:
        """Import the ability's module, with the libraries it needs, and return its function."""
        return getattr(import_module(cls._module(ability)), ability)

    @classmethod
    def _module(cls, ability: Ability) -> str:
        return f"{cls.__module__.rpartition('.')[0]}.{'stage' if ability == 'run' else ability}"

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        """Packages whose version decides what the settings mean, as lm_eval's does for its tasks: part of a
        fingerprint."""
        return ()

    @property
    def published_dtype(self) -> str | None:
        """Of the weights that it publishes; None where it makes no model."""
        return None

    @property
    def processes(self) -> int:
        """How many processes a step of this stage runs in on one machine."""
        return 1

    def needs(self) -> dict[str, Need]:
        """What the stage reads, by the name under which `run` finds it in `context.inputs`."""
        raise NotImplementedError

    def check(self, files: dict[str, Path]) -> None:
        """Look for what is wrong with the files it reads, before any step runs. Raises UserError.

        `files` are the files of the `data` needs and, for a model that is not made yet, the one its chain begins with.
        """

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """What of others' code it runs, a line for each kind, for --plan; `files` are the local ones it reads."""
        return []

    def paid_requests(self, files: dict[str, Path]) -> list[str]:
        """What each of its steps will ask of a service that may charge for it, a line for each kind; `files` are those
        of the `data` needs that are here."""
        return []

    def shortened(self, share: Fraction) -> Self:
        """This stage with that share of its training, for a search; only where `search_metrics` names metrics."""
        raise NotImplementedError

    def split(self) -> dict[str, Self]:
        """The steps this stage is made of: suffix -> config. Most stages are one step, with the suffix ''."""
        return {"": self}


@dataclass(frozen=True)
class Input:
    """One input of a running step: where it lies and how it was made."""

    path: Path
    step: str | None = None
    """The step of this recipe that made it; None for a file, a folder or a model found by reference."""
    kind: str | None = None
    """The kind of stage that made it, None likewise."""
    fingerprint: str = ""
    """The step's fingerprint, or the content hash of what was found by reference."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings it was made with (the stage's section of the recipe, resolved)."""
    metrics: Metrics = field(default_factory=Metrics)
    """What its `run` returned."""
    inputs: dict[str, Input] = field(default_factory=dict)
    """What it was made from in turn."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the recipe's matrix, the axes on which the step depends, with the cell's values."""
    reference: str = ""
    """What the recipe calls a file, a folder or a model found by reference, without a path of this machine."""


@dataclass(frozen=True)
class Context:
    """All that a stage sees when it runs."""

    recipe: str
    """The recipe's name."""
    step: str
    config: Any
    """The stage's own StageConfig."""
    inputs: dict[str, Input]
    out: Path
    """An empty folder; what is left in it when `run` returns is published."""
    scratch: Path
    """A folder for temporary files, removed afterwards."""
    checkpoints: Path
    """A folder that is kept until the step is published: what an interrupted attempt left in it is still there."""
    cache: Path
    """A folder shared by all steps for what is costly to derive and keyed by content (converted models)."""
    progress: Callable[[int, int, str], None]
    """progress(done, total, note): what the console shows while the step runs."""
    logs: Path | None = None
    """The folder of the run's logs, kept beside its results; None where the step is no part of a run."""
