"""Symbolic links in a runs folder that lead out of it: nothing is written, deleted or published through one.

The links of this program, from a run's folder to its results, stay inside; so may the links of others.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.recipe.nodes import RecipeError

_NOT_ENTERED = ("scratch", "out")
"""Folders of an unfinished step that are deleted as a whole, without following a link, before anything is written."""


def refuse_foreign_links(runs: Path) -> None:
    """Raise RecipeError if a link below `runs`, which may itself be a link, leads out of it."""
    if links := sorted(_foreign_links(runs.resolve())):
        text = f"is a symbolic link out of {runs}, through which nothing is written or deleted; delete the link"
        raise RecipeError([f"{runs / link}: {text}" for link in links[:20]])


def _foreign_links(root: Path) -> Iterator[Path]:
    queue = [root] if root.is_dir() else []
    while queue:
        folder = queue.pop()
        parts = folder.relative_to(root).parts
        is_published = len(parts) == 3 and parts[0] == "store" and parts[1] not in ("unfinished", "locks")
        is_deleted = len(parts) == 4 and parts[:2] == ("store", "unfinished") and parts[3] in _NOT_ENTERED
        if is_published or is_deleted:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                        yield Path(entry.path).relative_to(root)
                elif entry.is_dir(follow_symlinks=False):
                    queue.append(Path(entry.path))
