"""`run-recipe`: arguments in, exit code out.

0: done; 1: a stage failed (the others that do not need it have still run), or --verify found something; 2: the recipe
or the command line is wrong; 130: interrupted. Without arguments it lists the recipes near by.
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.console.console import Console
from pipeline.console.recipe_list import list_recipes
from pipeline.console.resume_command import resume_command
from pipeline.plan import search
from pipeline.plan.cache import refresh, reports_of
from pipeline.plan.planner import Plan, make_plan
from pipeline.preflight.estimate import estimate
from pipeline.preflight.estimate_table import lines, tables
from pipeline.preflight.prefetch import prefetch, told
from pipeline.preflight.preview import preview
from pipeline.preflight.probe import ProbeError
from pipeline.recipe import loader as recipes
from pipeline.recipe.loader import RecipeError
from pipeline.run import run_record as record
from pipeline.run.local_executor import Executor, LocalExecutor
from pipeline.run.loop import Run
from pipeline.run.os_errors import explain_os_error
from pipeline.store.hash_cache import HashCache
from pipeline.store.store import Store
from pipeline.store.verify import verify
from stages.system.terminal_text import safe

INTERRUPTED = 130
EXAMPLES = """\
examples:
  run-recipe recipes/wit_dpo.yaml                           all without a result
  run-recipe recipes/wit_dpo.yaml --preview 3 --stage wit   what tokens weigh
  run-recipe recipes/pocket_grid.yaml --cells prompt=0.2    a part of a grid
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if not given:
        Console().recipes(list_recipes(Path()))
        return 0
    if (options.recipe is None) == (options.verify is None):
        parser.error("name a RECIPE, or a folder of runs by --verify RUNS")
    console = Console(quiet_stdout=options.json)
    try:
        return _run(options, console)
    except RecipeError as error:
        console.close()
        print(safe(f"run-recipe: {error}").replace("\n", "\nrun-recipe: "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.close()
        print("run-recipe: interrupted before anything ran", file=sys.stderr)
        return INTERRUPTED
    except ProbeError as error:
        print(safe(f"run-recipe: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        console.close()
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            why = f"it may not be written to; name another folder by --runs ({error})"
        else:
            why = explain_os_error(error) or str(error)
        print(safe(f"run-recipe: {options.runs}: cannot be used for results: {why}"), file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.verify:
        return _verify(options, console)
    cells = recipes.load(options.recipe, options.set, options.cells)
    if options.status:
        return _status(options, cells[0].name, console)
    store = Store(options.runs / "store")
    cells[0].problems.extend(search.problems_of(cells))
    whole = make_plan(cells, HashCache(options.runs / "cache" / "hashes.json"), options.runs)
    if options.preview:
        return _preview(options, whole, store, console, _chosen(options, whole)[0])
    if options.estimate:
        return _estimate(options, whole, store, console, *_chosen(options, whole))
    if options.prefetch:
        return _prefetch(options, whole, store, console, _chosen(options, whole)[0])
    if options.plan:
        return _plan(options, search.plans(whole, cells, console, None), store, console)
    if cells[0].search:  # what the last rung needs is looked at before the first one runs
        Run(whole, store, options.runs, console, {step.name for step in whole.steps}, set()).prepare()
    return _execute(options, search.plans(whole, cells, console, options.runs / cells[0].name), store, console)


def _chosen(options: argparse.Namespace, plan: Plan) -> tuple[set[str], set[str]]:
    """The names of the steps that may run, and of those that run although they are cached."""
    stage = plan.named(options.stage, "--stage")
    onward = plan.descendants(plan.named(options.from_, "--from"))
    forced = stage | onward | plan.named(options.force, "--force")
    return stage | onward if options.stage or options.from_ else {step.name for step in plan.steps}, forced


def _plan(options: argparse.Namespace, plans: Iterator[Plan], store: Store, console: Console) -> int:
    for plan in plans:  # of a search, those whose steps have all run lead to the next
        chosen, forced = _chosen(options, plan)
        refresh(plan, store, forced)
        if any(step.state == "run" for step in plan.steps):
            break
    plan.require_choice(chosen)
    plan.require_inputs(chosen)
    if options.json:
        print(json.dumps(plan.as_json(chosen), indent=1))
    else:
        console.plan(plan, chosen)
    return 0


def _execute(options: argparse.Namespace, plans: Iterator[Plan], store: Store, console: Console) -> int:
    executor, run, made, failed = None, None, set[str](), list[Run]()
    asked_to_end = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for plan in plans:
            chosen, forced = _chosen(options, plan)
            run = Run(plan, store, options.runs, console, chosen, forced - made)
            made |= forced
            run.prepare()
            plan.require_choice(chosen)
            cached = sum(step.state == "cached" for step in plan.steps)
            console.say(f"{plan.recipe.name}: {len(plan.steps)} steps, {cached} cached")
            console.asks(run.paid_requests)
            executor = executor or _executor(options)
            if run.execute(executor):
                failed.append(run)
    except KeyboardInterrupt:
        if run is None or not run.record.steps:
            raise
        console.close()
        counts, command = record.counted(list(run.record.steps.values())), _to_go_on(options, run)
        print(safe(f"run-recipe: interrupted: {counts}; to go on:\n  {command}"), file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, asked_to_end)
        console.close()
    for step, metrics in reports_of(plan):
        console.results(options.runs / plan.recipe.name / step, metrics)
    if failed:
        steps = [step for each in failed for step in each.record.steps.values()]
        console.not_made(steps, _to_go_on(options, failed[-1]))
    if options.json:
        print(json.dumps(record.read(options.runs / plan.recipe.name), indent=1))
    return 1 if failed else 0


def _to_go_on(options: argparse.Namespace, run: Run) -> str:
    return resume_command(options, run.unmade(), run.forced)


def _executor(options: argparse.Namespace) -> Executor:
    if options.executor == "local":
        return LocalExecutor(options.jobs)
    try:
        from pipeline.run.ray_executor import RayExecutor
    except ImportError as error:
        raise RecipeError([f"--executor ray: {error}; pip install -e '.[ray]'"]) from None
    return RayExecutor(options.runs, options.jobs)


def _verify(options: argparse.Namespace, console: Console) -> int:
    if not (options.verify / "store").is_dir():
        raise RecipeError([f"--verify {options.verify}: is no folder of runs, for it has no folder 'store' in it"])
    found = verify(options.verify)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        for problem in found.problems:
            console.say(str(problem))
        console.say(f"{found.steps} steps, {found.files} files, {len(found.problems)} problems")
    return 1 if found.problems else 0


def _status(options: argparse.Namespace, name: str, console: Console) -> int:
    try:
        found = record.read(options.runs / name)
    except (OSError, ValueError) as error:
        raise RecipeError([f"--status: {name} has left nothing to tell in {options.runs}: {error}"]) from None
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        console.status(found)
    return 0


def _preview(options: argparse.Namespace, plan: Plan, store: Store, console: Console, chosen: set[str]) -> int:
    shown = preview(plan, store, options.runs, console, chosen, options.preview)
    if options.json:
        print(json.dumps({"recipe": plan.recipe.name, "stages": [stage.values for stage in shown]}, indent=1))
    else:
        for stage in shown:
            console.preview(stage.text, stage.page)
    return 0


def _estimate(
    options: argparse.Namespace, plan: Plan, store: Store, console: Console, chosen: set[str], forced: set[str]
) -> int:
    search.say_share(plan, console)
    whole = estimate(plan, store, options.runs, console, chosen, forced, options.jobs)
    if options.json:
        print(json.dumps(whole.as_json(), indent=1))
    else:
        console.estimate(tables(whole), lines(whole))
    return 0


def _prefetch(options: argparse.Namespace, plan: Plan, store: Store, console: Console, chosen: set[str]) -> int:
    found = prefetch(plan, store, options.runs, console, chosen)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for line in told(found):
            console.say(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "run-recipe",
        usage="%(prog)s [RECIPE] [options]",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=20),
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group()  # one for all, without a title: the whole is to fit a screen
    add = group.add_argument
    add("recipe", type=Path, nargs="?", metavar="RECIPE", help="a YAML file; run-recipe alone lists those near by")
    add("--stage", action="append", default=[], metavar="NAME", help="run again just this stage, from cached inputs")
    add("--from", action="append", default=[], metavar="NAME", dest="from_", help="run again this stage and all after")
    add("--force", action="append", default=[], metavar="NAME", help="run this stage although its result is there")
    add(
        "--cells",
        action="append",
        default=[],
        metavar="AXIS=V",
        help="of a grid, only these cells; AXIS=V,AXIS=V: both hold",
    )
    add("--set", action="append", default=[], metavar="KEY=V", help="override a value of the recipe")
    instead = group.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="show what would run, and why, without running")
    instead.add_argument("--status", action="store_true", help="show how far a run is, or how the last one went")
    instead.add_argument(
        "--preview", type=_positive, metavar="N", help="show N training rows of the sft stages, token by token"
    )
    instead.add_argument("--estimate", action="store_true", help="show what the steps take before anything runs")
    instead.add_argument("--prefetch", action="store_true", help="fetch all that is needed to run without a network")
    instead.add_argument(
        "--verify", type=Path, metavar="RUNS", help="check every hash in a folder of runs; takes no RECIPE"
    )
    add("--json", action="store_true", help="print only JSON: what is shown, or else how the run went")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where results are kept (default: runs)")
    add(
        "--executor", choices=["local", "ray"], default="local", metavar="E", help="local; ray: at RAY_ADDRESS, or here"
    )
    add("--jobs", type=_positive, metavar="N", help="steps side by side (default: one a GPU; else a core, <= 4)")
    add("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
