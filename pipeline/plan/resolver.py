"""References of a plan -> content hashes, commits and local paths, each looked up once."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.plan.step import Step
from pipeline.recipe.loader import RecipeError
from pipeline.store import references
from pipeline.store.hash_cache import HashCache
from pipeline.store.references import Hub, Local, Reference
from stages.base import UserError


class Resolver:
    """Looks up references for one command, whose folder of results is `runs`."""

    def __init__(self, runs: Path, say: Callable[[str], None]) -> None:
        self.runs = runs
        self.hashes = HashCache(runs / "cache" / "hashes.json", say)
        self.paths: dict[Reference, Path] = {}
        """References that were fetched -> local path."""
        self._cache = runs / "cache"
        self._say = say
        self._contents: dict[Reference, str | None] = {}
        self._pins: dict[Reference, Reference] = {}
        """Hub references to a branch -> the same at the commit of this moment."""
        self._keys: dict[Reference, str] = {}
        """Reference -> file, line and key that name it first, for errors."""

    def register(self, source: Reference, key: str) -> None:
        """Hash the content of a reference that `key` of the recipe names. Raises UserError or OSError."""
        self._keys.setdefault(source, key)
        self.content(source)

    def content(self, source: Reference) -> str | None:
        """The content hash; None for a branch of the hub whose commit is not known yet. Raises UserError."""
        pinned = self.pinned(source)
        if pinned not in self._contents:
            self._contents[pinned] = references.content_hash(pinned, self.hashes.hash_file)
        return self._contents[pinned]

    def pinned(self, source: Reference) -> Reference:
        """The reference at the commit that `pin` found for it."""
        return self._pins.get(source, source)

    def path(self, source: Reference) -> Path:
        """The local path of a reference that was fetched."""
        return self.paths[self.pinned(source)]

    def pin(self, steps: Iterable[Step]) -> None:
        """Ask the hub for the commits of all branches that the steps refer to. Raises RecipeError."""
        errors: dict[Reference, str] = {}
        for source in (source for step in steps for source in step.references.values()):
            if isinstance(source, Hub) and not source.commit and source not in {*self._pins, *errors}:
                try:
                    self._pins[source] = references.resolve(source, self._say)
                except UserError as error:
                    errors[source] = f"{self._keys[source]}: {error}"
        if errors:
            raise RecipeError(list(errors.values()))

    def fetch(self, steps: Iterable[Step]) -> None:
        """Make all references of the steps available on this machine. Raises RecipeError."""
        steps, errors = list(steps), []
        with_code = {source for step in steps for source in step.models_with_code}
        for source in dict.fromkeys(source for step in steps for source in step.references.values()):
            pinned = self.pinned(source)
            if pinned not in self.paths:
                if not isinstance(pinned, Local):
                    self._say(f"fetching {pinned}")
                try:
                    code = source in with_code
                    self.paths[pinned] = references.fetch(pinned, self._cache, code, self.hashes.hash_file)
                except UserError as error:
                    errors.append(f"{self._keys[source]}: {error}")
                    continue
            references.cache_commit(source, pinned)
        if errors:
            raise RecipeError(errors)

    def local_files(self, step: Step) -> dict[str, Path]:
        """Input name -> path, for references of the step that are on this machine already. Asks no network."""
        paths = {name: references.find_local(source, self._cache) for name, source in step.references.items()}
        return {name: path for name, path in paths.items() if path}

    def changed_file(self, step: Step) -> str | None:
        """An error if a local file that the step read changed since its content hash was computed."""
        for source in step.references.values():
            if isinstance(source, Local):
                with contextlib.suppress(UserError):
                    if references.content_hash(source, self.hashes.hash_file) == self.content(source):
                        continue
                return f"{source.path} was changed while the step ran; run it again"
        return None
