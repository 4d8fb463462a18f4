"""The command that goes on with a run that failed or was interrupted."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

MOST_NAMED = 6
"""Steps beyond which --stage, --from and --force are repeated as they were given, for nobody reads so many names."""


def resume_command(options: argparse.Namespace, left: Collection[str], forced: Collection[str]) -> str:
    """What to type, quoted for a shell.

    Args:
        options: of the command that ran.
        left: the steps that it was to make and has not made.
        forced: those that it was to make although their results were there.
    """
    only = bool(options.stage or options.from_)
    named = [(("--stage" if only else "--force"), step) for step in left if only or step in forced]
    if not left or len(named) > MOST_NAMED:
        given = {"--stage": options.stage, "--from": options.from_, "--force": options.force}
        named = [(flag, name) for flag, names in given.items() for name in names]
    named += [("--cells", cells) for cells in options.cells]
    named += [("--set", setting) for setting in options.set]
    if options.runs != Path("runs"):
        named.append(("--runs", str(options.runs)))
    if options.executor != "local":
        named.append(("--executor", options.executor))
    if options.jobs:
        named.append(("--jobs", str(options.jobs)))
    return shlex.join([*_called(), str(options.recipe), *(word for pair in named for word in pair)])


def _called() -> list[str]:
    """`run-recipe`, or the path by which it was called where it is not on the search path."""
    name = "run-recipe"
    return [sys.argv[0]] if Path(sys.argv[0]).name == name and not shutil.which(name) else [name]
