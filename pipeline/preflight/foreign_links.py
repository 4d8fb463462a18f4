"""Symbolic links in a runs folder: nothing is written, deleted or published through one.

The links of this program lead from a run's folder to its results in the store. Any other is refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.recipe.nodes import RecipeError

_NOT_ENTERED = ("scratch", "out")
"""Folders of an unfinished step that are deleted as a whole, without following a link, before anything is written."""


def refuse_foreign_links(runs: Path) -> None:
    """Raise RecipeError if there is another link below `runs`, which may itself be one."""
    if links := sorted(_foreign_links(runs.resolve())):
        text = "is a symbolic link to something else than a result, and nothing is written or deleted through it"
        raise RecipeError([f"{runs / link}: {text}; delete the link" for link in links[:20]])


def _foreign_links(root: Path) -> Iterator[Path]:
    queue = [root] if root.is_dir() else []
    while queue:
        folder = queue.pop()
        parts = folder.relative_to(root).parts
        is_published = len(parts) == 3 and parts[0] == "store" and parts[1] not in ("unfinished", "locks")
        is_deleted = len(parts) == 4 and parts[:2] == ("store", "unfinished") and parts[3] in _NOT_ENTERED
        if is_published or is_deleted:
            continue
        is_run = len(parts) == 1 and parts[0] not in ("store", "cache")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not is_run or not Path(os.path.realpath(entry.path)).is_relative_to(root / "store"):
                        yield Path(entry.path).relative_to(root)
                elif entry.is_dir(follow_symlinks=False):
                    queue.append(Path(entry.path))
