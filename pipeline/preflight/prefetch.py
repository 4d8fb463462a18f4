"""`--prefetch`: download everything that a recipe needs, so that it then runs with HF_HUB_OFFLINE=1 and no network.

References go where a run would put them. What stages need besides, such as the data sets of benchmarks, they download
themselves in a separate process.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import paid_requests
from pipeline.plan.step import Plan, Step
from pipeline.preflight.probe import Request, run_probe
from pipeline.store.references import Local


@dataclass(frozen=True)
class FetchedReference:
    reference: str
    path: str
    bytes: int


@dataclass(frozen=True)
class FetchedByStage:
    """What a stage downloaded, in words."""

    stage: str
    fetched: list[str]


@dataclass(frozen=True)
class Prefetched:
    recipe: str
    references: list[FetchedReference]
    stages: list[FetchedByStage]
    need_network: list[str]
    """What still needs a network when the recipe runs."""
    whole: bool
    """Whether all steps of the recipe were selected."""

    def lines(self) -> Iterable[str]:
        """Return the same in words."""
        for each in self.references:
            yield f"{each.reference}: {each.bytes / 2**20:.1f} MiB in {each.path}"
        for stage in self.stages:
            yield from (f"{stage.stage}: {text}" for text in stage.fetched)
        yield from (f"still needs a network: {text}" for text in self.need_network)
        size = sum(each.bytes for each in self.references) / 2**20
        count = f"{len(self.references)} references, {size:.1f} MiB" if self.references else "no reference"
        subject = "it" if self.whole else "the selection"
        exception = ", except for the above" if self.need_network else ""
        yield f"{self.recipe}: {count} to fetch; with HF_HUB_OFFLINE=1 {subject} now runs without a network{exception}"


def prefetch(plan: Plan, resolver: Resolver, say: Callable[[str], None], selected: frozenset[str]) -> Prefetched:
    """Download what the selected steps need.

    Raises:
        RecipeError: if something is not available.
        ProbeError: if the process that downloads fails for another reason.
    """
    steps = [step for step in plan.steps if step.name in selected]
    resolver.pin(plan.steps)
    resolver.fetch(steps)
    references = [
        FetchedReference(str(source), str(path), _bytes(path))
        for source, path in resolver.paths.items()
        if not isinstance(source, Local)
    ]
    able = [step for step in steps if (step.config.evaluation or step.config).has("fetch")]
    able = list({_same_downloads(step): step for step in reversed(able)}.values())[::-1]
    if able:
        say(f"downloading what {', '.join(step.stage for step in able)} need")
    requests = [
        Request(step, {name: resolver.path(source) for name, source in step.references.items()}) for step in able
    ]
    answers = run_probe("fetch", "--prefetch", resolver.runs / "cache", requests)
    stages = [FetchedByStage(step.stage, answer["fetched"]) for step, answer in zip(able, answers, strict=True)]
    online = [f"{step.stage}: {request}" for step in steps for request in paid_requests(step, resolver)]
    return Prefetched(plan.recipe.name, references, stages, list(dict.fromkeys(online)), len(steps) == len(plan.steps))


def _same_downloads(step: Step) -> str:
    """Equal for steps that download the same."""
    files = sorted(str(source) for name, source in step.references.items() if name != "model")
    settings = (step.config.evaluation.model_dump() if step.config.evaluation else step.settings()) | {"models": None}
    return json.dumps([step.kind, settings, files], sort_keys=True, default=str)


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
