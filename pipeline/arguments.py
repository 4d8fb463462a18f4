"""The options of `run-recipe`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.recipe.nodes import RecipeError
from stages.system.did_you_mean import did_you_mean

EXAMPLES = """\
  run-recipe recipes/wit_dpo.yaml                           what has no result
  run-recipe recipes/wit_dpo.yaml --preview 3 --stage wit   weights of tokens
  run-recipe recipes/pocket_grid.yaml --cells prompt=0.2    a part of a grid
"""


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
    add("--stage", action="append", default=[], metavar="NAME", help="rerun only this stage, from cached inputs")
    add("--from", action="append", default=[], metavar="NAME", dest="from_", help="rerun this stage and all after it")
    add("--force", action="append", default=[], metavar="NAME", help="run this stage even if it has a result")
    add(
        "--cells",
        action="append",
        default=[],
        metavar="AXIS=V",
        help="only these cells of a grid; AXIS=V,AXIS=V: both hold",
    )
    add("--set", action="append", default=[], metavar="KEY=V", help="override a value of the recipe")
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
