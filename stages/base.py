"""The protocol between the pipeline and the kinds of stages: a config model, named inputs, run(context) -> Metrics.

Imports no torch, so that a recipe can be read and planned quickly.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from stages.records.metrics import Metrics
from stages.system.terminal_text import first_line

BASE = "base"
"""The name by which stages refer to the recipe's own model."""


class UserError(Exception):
    """An error that the user can fix: a wrong data row, an impossible option. The message has place, cause and remedy.

    Args:
        message: the text.
        key: the key in the stage's section that is to blame, such as `tasks.0.task`. The pipeline adds file and line.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


AT_KEY = "at_key"
"""The type of errors that `wrong_at` creates."""


def wrong_at(key: str, message: str) -> PydanticCustomError:
    """Create the error that a validator of a whole section raises if one of its keys, `key`, is to blame."""
    return PydanticCustomError(AT_KEY, "{message}", {"message": message, "key": key})


class Config(BaseModel):
    """A part of a recipe. Unknown keys are errors, and no value is converted: a string is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Need:
    """Something that a stage reads: the result of another stage, or a reference."""

    kind: Literal["model", "data", "steps", "run"]
    """`model`: a stage's name, `base`, or a reference to a model. `data`: a reference to a file or folder. `steps`: the
    results of all steps of the stage that `value` names, or of all steps that score models for `*`. `run`: the name of
    a recipe, for the results of its last run in the same runs folder."""
    value: str
    """The text in the recipe."""
    key: str
    """The key in the stage's section, dotted: `data.train`, `tasks.0.data.test`."""
    code: bool = False
    """Whether the model's own Python files are downloaded with it."""
    optional: bool = False
    """Whether `*` can match no step."""
    model_need: str = ""
    """For `steps`: the name of another need, a model. Only steps that scored that model match."""


class Items(NamedTuple):
    """Items on which a stage measures models. Two stages have the same items if content of `input` and `part` agree."""

    key: str
    """The key in the stage's section that names them, dotted."""
    input: str | None
    """The input that has them, by its name in `needs()`; None if lm-eval's task decides."""
    part: str = ""
    """Which of several: a task and its split."""


_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Resources(Config):
    """What each step of a stage needs of a machine. A step starts where and when that much is free."""

    gpus: int | float | None = Field(default=None, ge=0)
    """GPUs, or a share of one such as 0.5. The default, where there are GPUs, is one for each of its processes; on one
    machine, a step of one process takes the share that its estimated memory is."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores. The default is an equal share of the machine; on a cluster one core for each of its processes."""
    memory: str | None = Field(default=None, pattern=r"^\d+(\.\d+)?(MiB|GiB|TiB)$")
    """Main memory, such as 64GiB. By default memory is not counted."""

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, gpus: float | None) -> float | None:
        if gpus and gpus > 1 and gpus != int(gpus):
            raise ValueError("is a whole number, or a share of one GPU below 1")
        return gpus

    @property
    def bytes(self) -> int:
        """`memory` in bytes; 0 if memory is not counted."""
        return int(float(self.memory[:-3]) * _UNITS[self.memory[-3:]]) if self.memory else 0


class Findings(BaseModel):
    """What the check of a step found before it runs."""

    passed: list[str] = []
    """What was checked, in a few words each."""
    notes: list[tuple[str, str]] = []
    """Likely slips, which do not stop a run: the key in the stage's section and the text."""
    problems: list[tuple[str | None, str]] = []
    """Errors, in the same form; without a key where the text names the place."""
    published: int = 0
    """Bytes of the result on disk, where they are many."""
    checkpoints: int = 0
    """Bytes of checkpoints while the step runs, at most."""
    gpu_memory: int = 0
    """Bytes of a GPU that the step needs by its estimate; 0 if they are unknown or there is no GPU."""
    tasks: list[str] = []
    """lm-eval's tasks that the step scores, those in groups too, each with its split if that is not the task's own."""

    @contextmanager
    def part(self, name: str, key: str | None = None) -> Iterator[None]:
        """Collect the error of the block, which checks `name`; a UserError without a key blames `key`."""
        try:
            yield
        except UserError as error:
            self.problems.append((error.key or key, str(error)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of a library, as tokenizers' own kind is; no reason to refuse a run
            self.passed.append(f"{name} not checked ({first_line(error)})")
        else:
            self.passed.append(name)


Ability = Literal["run", "preview", "estimate", "requests", "fetch", "check", "scorer", "probe"]
"""What a kind of stage does in a process of its own. Each ability is a function of that name in a module of the kind's
folder, or of the folder of a class that it extends: `run` in stage.py, which every kind has; the others in preview.py,
estimate.py, requests.py, fetch.py, check.py, scorer.py and probe.py, if the file exists.

    run(context: Context) -> Metrics                          run a step
    preview(step, config, paths, count) -> (dict, str, Any)   show `count` rows: JSON, an HTML page, a rich renderable
    estimate(config, inputs) -> Estimate                      see stages/estimate/result.py
    requests(config, inputs) -> list[Request]                 what an evaluation asks its model, for its estimate
    fetch(config, paths, scratch) -> list[str]                download what no key names, one line for each download
    check(context, on_this_machine) -> Findings               check what `StageConfig.check` cannot without libraries
    scorer(context) -> Callable                               score models in memory, see stages/lm_eval/scorer.py
    probe(context) -> dict                                    try the largest step: JSON, empty if it cannot

`paths` holds the path of each input; for a model that does not exist yet, that of the model its training starts from.
"""


class StageConfig(Config):
    """One stage of a recipe. Each kind has a subclass with its own fields.

    What is cheap to know about a kind is a class variable or a method here; what needs torch is an `Ability`.
    """

    kind: ClassVar[str]
    """The word after `kind:` in a recipe."""
    output_kind: ClassVar[Literal["model", "scores", "report", "record"]]
    """What its steps publish: a model, scores of a model, a report on scores, or a record of an upload."""
    version: ClassVar[int]
    """Raised when the same settings give another result, so that older results are computed again."""
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that cannot change the result; they are not part of the fingerprint."""
    search_metrics: ClassVar[Mapping[str, Literal["lowest", "highest"]]] = {}
    """Metrics on the stage's evaluation data by which a search can choose among cells -> which value is best. The first
    is the default. Empty if the kind cannot be searched over."""
    cost_invariant: ClassVar[tuple[str, ...]] = ("seed",)
    """Dotted keys that do not affect cost; steps that differ only in these share one estimate."""
    is_forked: ClassVar[bool] = False
    """Whether its steps are forks of a process that has imported their libraries. No import may start a thread."""
    writes_to: ClassVar[str | None] = None
    """The key that names what each step writes outside the store, such as a repository. No two steps can share it."""

    resources: Resources = Resources()
    """What each of its steps needs of a machine. Not part of the fingerprint."""

    @property
    def evaluation(self) -> "StageConfig | None":
        """The evaluation by which a training selects a point; None without one."""
        return None

    @classmethod
    def has(cls, ability: Ability) -> bool:
        """Whether stages of this kind have the ability. Imports the kind's package, not the module."""
        return cls._module(ability) is not None

    @classmethod
    def load(cls, ability: Ability) -> Callable[..., Any]:
        """Import the ability's module, with the libraries it needs, and return its function."""
        module = cls._module(ability)
        assert module, f"stages of kind {cls.kind} have no {ability}"
        return getattr(import_module(module), ability)

    @classmethod
    def _module(cls, ability: Ability) -> str | None:
        folders = (base.__module__.rpartition(".")[0] for base in cls.__mro__ if issubclass(base, StageConfig))
        names = (f"{folder}.{'stage' if ability == 'run' else ability}" for folder in folders if folder != "stages")
        return next((name for name in names if find_spec(name)), None)

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        """Packages whose version changes the meaning of the settings, such as lm_eval's: part of the fingerprint."""
        return ()

    @property
    def published_dtype(self) -> str | None:
        """The dtype of the published weights; None if the kind publishes no model."""
        return None

    @property
    def processes(self) -> int:
        """Number of processes of one step on one machine."""
        return 1

    @property
    def can_share_gpu(self) -> bool:
        """Whether a step takes as much of one GPU as its estimate says, and leaves the rest to others."""
        return self.processes == 1 and self.resources.gpus is None

    def needs(self) -> dict[str, Need]:
        """Return what the stage reads, by the name under which `run` finds it in `context.inputs`."""
        raise NotImplementedError

    def named_files(self, files: dict[str, Path]) -> dict[str, Path]:
        """Return further files that those in `files` name and the stage reads: a name of each for people -> path.

        They become inputs of the step, and so part of its fingerprint.

        Args:
            files: path of each need that is a local file or folder.

        Raises:
            UserError: if they cannot be read.
        """
        return {}

    def check(self, files: dict[str, Path]) -> None:
        """Check the files that the stage reads, before any step runs.

        Args:
            files: path of each `data` need, and of each model or of the model that its training starts from.

        Raises:
            UserError: if a step could not use them.
        """

    def check_services(self) -> None:
        """Check the services that the stage needs, such as an endpoint, each time before it runs. Raises UserError."""

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """Describe third-party code that the stage runs, one line for each kind. `files` are inputs on this machine."""
        return []

    def paid_requests(self, files: dict[str, Path]) -> list[str]:
        """Describe requests to services that may charge for them, as `foreign_code` describes code."""
        return []

    def measured_items(self) -> list[Items]:
        """Return the items that a stage of scores reports on, or by which a training chooses what it publishes."""
        return []

    def shortened(self, share: Fraction) -> Self:
        """Return this stage with `share` of its training, for a search. Only for kinds with `search_metrics`."""
        raise NotImplementedError

    def split(self) -> dict[str, Self]:
        """Return the stage's steps: suffix of the name -> config. Most stages have one step, with the suffix ''."""
        return {"": self}


@dataclass(frozen=True)
class Input:
    """One input of a running step: its path and its origin."""

    path: Path
    step: str | None = None
    """The step that published it; None for a reference."""
    kind: str | None = None
    """The kind of that step; None for a reference."""
    fingerprint: str = ""
    """The step's fingerprint, or the content hash of the reference."""
    config: dict[str, Any] = field(default_factory=dict)
    """The step's section of the recipe, resolved."""
    metrics: Metrics = field(default_factory=Metrics)
    inputs: "dict[str, Input]" = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    """The axes of the recipe's matrix on which the step depends -> the values of its cell."""
    reference: str = ""
    """What the recipe calls a file, folder or model, without a path of this machine."""


@dataclass(frozen=True)
class Context:
    """Everything that a stage sees when it runs."""

    recipe: str
    step: str
    config: Any
    """The stage's own StageConfig."""
    inputs: dict[str, Input]
    out: Path
    """An empty folder. Its content is published when `run` returns."""
    scratch: Path
    """A folder for temporary files, deleted afterwards."""
    checkpoints: Path
    """A folder that stays until the step is published, so that the next attempt finds what an interrupted one left."""
    cache: Path
    """A folder shared by all steps, for derived data under its content hash."""
    progress: Callable[[int, int, str], None]
    """progress(done, total, note): what the console shows while the step runs."""
    logs: Path | None = None
    """The folder of the run's logs. None if the step is not part of a run."""
    only_probe: bool = False
    """Whether a training ends after it has tried its longest rows."""
