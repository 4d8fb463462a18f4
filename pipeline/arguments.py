"""The options of `run-recipe`, and the command that continues a run that failed or was interrupted."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.recipe.nodes import RecipeError
from stages.system.did_you_mean import did_you_mean

EXAMPLES = """\
  run-recipe recipes/wit_dpo.yaml                           what has no result
  run-recipe recipes/wit_dpo.yaml --preview 3 --stage wit   weights of tokens
  run-recipe recipes/pocket_grid.yaml --cells prompt=0.2    a part of a grid
"""
MAX_STEPS = 6
"""With more steps, --stage, --from and --force are repeated as they were typed: nobody reads so many names."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError([f"{message}; run-recipe --help lists the options"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RecipeError."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = [f"--{name.strip('_')}" for name in vars(options)]
        hint = did_you_mean(unknown[0], names) if unknown[0].startswith("-") else "; name one recipe"
        parser.error(f"unknown argument {unknown[0]!r}{hint}")
    if arguments and (options.recipe is None) == (options.verify is None):
        parser.error("name a RECIPE, or a folder of runs by --verify RUNS")
    if options.probe and not options.check:
        parser.error("--probe belongs to --check; write --check --probe")
    return options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Its help fits a screen of 24 lines."""
    parser = _Parser(
        "run-recipe",
        usage="%(prog)s [RECIPE] [options]",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=20),
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group()  # a single group without a title saves lines of help
    add = group.add_argument
    add("recipe", type=Path, nargs="?", metavar="RECIPE", help="a YAML file; without it, recipes are listed")
    many: dict[str, Any] = {"action": "append", "default": []}
    add("--stage", **many, metavar="NAME", help="rerun only this stage, from cached inputs")
    add("--from", **many, metavar="NAME", dest="from_", help="rerun this stage and all after it")
    add("--force", **many, metavar="NAME", help="run this stage even if it has a result")
    add("--cells", **many, metavar="AXIS=V", help="only these cells of a grid; AXIS=V,AXIS=V: both hold")
    add("--set", **many, metavar="KEY=V", help="override a value of the recipe")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--plan", action="store_true", help="show what would run, and why; checks the recipe only")
    modes.add_argument("--check", action="store_true", help="check a run; with --probe, try its longest training rows")
    modes.add_argument("--status", action="store_true", help="show the progress of a run, or how the last one ended")
    modes.add_argument("--preview", type=_positive, metavar="N", help="show N training rows or pairs, by token")
    modes.add_argument("--estimate", action="store_true", help="show memory, disk and time before anything runs")
    modes.add_argument("--prefetch", action="store_true", help="download all that a run without a network needs")
    modes.add_argument("--verify", type=Path, metavar="RUNS", help="check every hash in a runs folder; needs no RECIPE")
    add("--probe", action="store_true", help=argparse.SUPPRESS)  # the help of --check names it
    add("--json", action="store_true", help="print only JSON: what is shown, or the record of the run")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of results (default: runs)")
    add(
        "--executor",
        choices=["local", "ray"],
        default="local",
        metavar="E",
        help="local, or ray: at RAY_ADDRESS or here",
    )
    add("--jobs", type=_positive, metavar="N", help="steps at once (default: one per core, <= 4 or <= 4 per GPU)")
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


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
    default = build_parser().get_default
    values = {name: getattr(options, name) for name in ("runs", "executor", "jobs")}
    flags += [(f"--{name}", str(value)) for name, value in values.items() if value != default(name)]
    return shlex.join([_program(), str(options.recipe), *(word for pair in flags for word in pair)])


def _program() -> str:
    """`run-recipe`, or its path if it is not on the search path."""
    name = "run-recipe"
    return sys.argv[0] if Path(sys.argv[0]).name == name and not shutil.which(name) else name
