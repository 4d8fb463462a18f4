"""The command that continues a run that failed or was interrupted."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

MAX_STEPS = 6
"""With more steps, --stage, --from and --force are repeated as they were typed: nobody reads so many names."""


def resume_command(options: argparse.Namespace, steps: Collection[str], forced: Collection[str]) -> str:
    """Return the command to type, quoted for a shell.

    `steps` are those selected without a result, `forced` those that were to run even if they had one.
    """
    restricted = bool(options.stage or options.from_)
    flags = [(("--stage" if restricted else "--force"), step) for step in steps if restricted or step in forced]
    if not steps or len(flags) > MAX_STEPS:
        typed = {"--stage": options.stage, "--from": options.from_, "--force": options.force}
        flags = [(flag, name) for flag, names in typed.items() for name in names]
    flags += [("--cells", cells) for cells in options.cells]
    flags += [("--set", setting) for setting in options.set]
    if options.runs != Path("runs"):
        flags.append(("--runs", str(options.runs)))
    if options.executor != "local":
        flags.append(("--executor", options.executor))
    if options.jobs:
        flags.append(("--jobs", str(options.jobs)))
    return shlex.join([_program(), str(options.recipe), *(word for pair in flags for word in pair)])


def _program() -> str:
    """`run-recipe`, or its path if it is not on the search path."""
    name = "run-recipe"
    return sys.argv[0] if Path(sys.argv[0]).name == name and not shutil.which(name) else name
