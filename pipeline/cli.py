"""`run-recipe`: parse the command line, call one function, return an exit code.

0: done. 1: a stage failed (stages that do not depend on it have still run), or --verify found something. 2: the recipe
or the command line is wrong. 130: interrupted. 141: nobody reads its output any more, as in `| head`. Without arguments
it lists recipes. With --json an error is an object on standard output: {"error": [{message, file, line, key}]}.
"""

import argparse
import errno
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.arguments import parse, resume_command
from pipeline.console.console import Console
from pipeline.console.progress_summary import count_steps
from pipeline.console.recipe_list import list_recipes
from pipeline.plan import search
from pipeline.plan.cache import cached_results, current_reports, decide, shorten
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, check_inputs, paid_requests, select, summarize
from pipeline.plan.step import Plan
from pipeline.preflight.estimate import estimate, lines, tables
from pipeline.preflight.prefetch import prefetch
from pipeline.preflight.prepare import Preparation, prepare, refuse_foreign_links, try_longest_rows
from pipeline.preflight.preview import preview
from pipeline.preflight.probe import ProbeError
from pipeline.recipe import loader
from pipeline.recipe.loader import Recipe, RecipeError
from pipeline.run.executor import Executor
from pipeline.run.local_executor import LocalExecutor
from pipeline.run.loop import Run
from pipeline.store.store import Store
from pipeline.store.verify import verify
from stages.records.run_record import read_run_record
from stages.system.os_errors import explain_os_error
from stages.system.secrets import mask_secrets
from stages.system.terminal_text import first_line, safe

INTERNAL_ERROR = 3
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stdout is None:  # closed by `>&-`
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # until exit
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nothing may be written at exit either: docs.python.org/3/library/signal.html
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # those of the results folder are caught below
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"run-recipe: standard output: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:
        return _fail("--json" in arguments, INTERNAL_ERROR, _internal_error(error))


def _internal_error(error: Exception) -> str:
    """Keep the traceback of an error that should not happen in a file; return a sentence on it."""
    text = f"internal error: {type(error).__name__}: {first_line(error)}"
    trace = mask_secrets("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="run-recipe-", suffix=".txt", delete=False) as file:
            file.write(trace)
    except OSError:
        return f"{text}; please report it with this traceback:\n  {trace.strip()}"
    return f"{text}; this is a mistake of run-recipe: please report it to its authors with {file.name}"


def _run(arguments: Sequence[str]) -> int:
    console, runs, as_json = Console(quiet_stdout=True), Path("runs"), "--json" in arguments
    try:
        options = parse(arguments)
        runs = options.runs
        if not arguments:
            Console().recipes(list_recipes(Path()))
            return 0
        console = Console(quiet_stdout=options.json)
        return _verify(options, console) if options.verify else _Command(options, console).run()
    except RecipeError as error:
        console.close()
        return _fail(as_json, 2, str(error), error.records)
    except KeyboardInterrupt:
        console.close()
        return _fail(as_json, INTERRUPTED, "interrupted before anything ran")
    except ProbeError as error:
        return _fail(as_json, 1, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        console.close()
        if error.errno == errno.EROFS:
            reason = f"its disk is read-only; name another folder by --runs ({error})"
        elif isinstance(error, NotADirectoryError):
            reason = "a part of this path is a file; name a folder by --runs"
        elif isinstance(error, FileNotFoundError) and not runs.exists():
            reason = f"it cannot be made; name another folder by --runs ({error})"
        elif isinstance(error, FileNotFoundError):
            reason = f"{error.filename} was deleted meanwhile; run the command again, which computes what is missing"
        else:
            reason = explain_os_error(error) or str(error)
        return _fail(as_json, 1, f"{runs}: cannot be used for results: {reason}")


def _fail(as_json: bool, code: int, text: str, records: Sequence[Mapping[str, Any]] = ()) -> int:
    """Show an error: lines on standard error, or the JSON object that --json promises; return the exit code."""
    text = mask_secrets(text)
    if as_json:
        unplaced = {"message": text, "file": None, "line": None, "key": None}
        print(mask_secrets(json.dumps({"error": list(records) or [unplaced]}, indent=1)))
    else:
        print(re.sub(r"\n(?! )", "\nrun-recipe: ", safe(f"run-recipe: {text}")), file=sys.stderr)
    return code


def _verify(options: argparse.Namespace, console: Console) -> int:
    if not (options.verify / "store").is_dir():
        raise RecipeError([f"--verify {options.verify}: is not a runs folder: it has no folder 'store'"])
    verification = verify(options.verify)
    counts = f"{verification.steps} steps, {verification.files} files, {len(verification.problems)} problems"
    _show(console, options, asdict(verification), [*map(str, verification.problems), counts])
    return 1 if verification.problems else 0


def _show(console: Console, options: argparse.Namespace, values: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print `values` with --json, else `lines`."""
    if options.json:
        print(json.dumps(values, indent=1))
    else:
        for line in lines:
            console.say(line)


class _Command:
    """One call of `run-recipe RECIPE`."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.store = Store(options.runs / "store")
        self.resolver = Resolver(options.runs, console.say)
        self._gpu_memory: dict[str, int] = {}
        """Step -> bytes of a GPU that it needs, by its estimate."""

    def run(self) -> int:
        options = self.options
        cells = loader.load(options.recipe, options.set, options.cells)
        if options.status:
            return self.status(cells[0].name)
        refuse_foreign_links(options.runs)
        cells[0].problems.extend(search.search_problems(cells))
        plan = build_plan(cells, self.resolver)
        if options.preview:
            return self.preview(plan)
        if options.estimate:
            return self.estimate(plan)
        if options.prefetch:
            return self.prefetch(plan)
        if options.plan:
            return self.plan(plan, cells)
        if options.check or cells[0].search:  # of a search, what the last rung needs is checked before the first runs
            everything = Selection(frozenset(step.name for step in plan.steps), frozenset())
            selection = everything if cells[0].search else self.select(plan)
            preparation = prepare(plan, selection, self.store, self.resolver, self.executor, self.console.say)
            if options.check:
                return self.check(plan, preparation)
            self._gpu_memory |= preparation.gpu_memory
            self.console.notes(preparation.notes)
        return self.execute(plan, cells)

    def check(self, plan: Plan, preparation: Preparation) -> int:
        disk = {"needed": preparation.disk, "free": preparation.disk_free}
        passed = {step: preparation.findings[step.name].passed for step in preparation.steps}
        if not self.options.json:
            lines = ((step.stage, step.name, ", ".join(texts)) for step, texts in passed.items())
            self.console.by_stage("checked", lines)
            self.console.notes(preparation.notes)
        probes = try_longest_rows(preparation, self.resolver, self.console.say) if self.options.probe else {}
        steps = [{"step": step.name, "kind": step.kind, "checked": texts} for step, texts in passed.items()]
        values = {
            "recipe": plan.recipe.name,
            "steps": steps,
            "notes": preparation.notes,
            "disk": disk,
            "probes": probes,
        }
        needed, free = (f"{value / 2**30:.2f} GiB" for value in disk.values())
        size = f"disk: at most {needed} for models and checkpoints, {free} free"
        count = f"{plan.recipe.name}: {len(steps)} steps to run, checked; nothing ran"
        text = "{step}: {rows} longest rows, up to {tokens:,} tokens: {seconds} s, {memory}"
        tried = [text.format(step=step, **batch) for step, batch in probes.items()]
        _show(self.console, self.options, values, [*tried, size, count])
        return 0

    def select(self, plan: Plan) -> Selection:
        return select(plan, self.options.stage, self.options.from_, self.options.force)

    def status(self, recipe: str) -> int:
        try:
            record = read_run_record(self.options.runs / recipe)
        except (OSError, ValueError) as error:
            raise RecipeError([f"--status: {self.options.runs} has no record of a run of {recipe}: {error}"]) from None
        if self.options.json:
            print(json.dumps(asdict(record), indent=1))
        else:
            self.console.status(record)
            missing = [step.step for step in record.steps if step.path and not (self.options.runs / step.path).is_dir()]
            if missing:
                text = f"deleted from {self.store.root}: the results of {', '.join(shorten(missing, 3))}"
                self.console.say(f"  {text}; the same command computes them again")
        return 0

    def preview(self, plan: Plan) -> int:
        selected = self.select(plan).selected
        previews = preview(plan, self.store, self.resolver, self.console, selected, self.options.preview)
        if self.options.json:
            print(json.dumps({"recipe": plan.recipe.name, "stages": [each.values for each in previews]}, indent=1))
        else:
            for each in previews:
                self.console.preview(each.text, each.page)
        return 0

    def estimate(self, plan: Plan) -> int:
        if sentence := search.cost_sentence(plan):
            self.console.say(sentence)
        costs = estimate(plan, self.store, self.resolver, self.console.say, self.select(plan), self.options.jobs)
        if self.options.json:
            print(json.dumps(costs.to_json(), indent=1))
        else:
            self.console.estimate(tables(costs), lines(costs))
        return 0

    def prefetch(self, plan: Plan) -> int:
        fetched = prefetch(plan, self.resolver, self.console.say, self.select(plan).selected)
        _show(self.console, self.options, asdict(fetched), fetched.lines())
        return 0

    def plan(self, full_plan: Plan, cells: Sequence[Recipe]) -> int:
        """--plan. Of a search, the first plan with steps to run."""
        plans = search.Search(full_plan, cells, self.resolver, self.console.say)
        for plan in plans.plans():
            selection = self.select(plan)
            decisions = decide(plan, self.store, self.resolver, selection.forced)
            if not all(decision.cached for decision in decisions.values()):
                break
            plans.results |= cached_results(decisions)
        check_inputs(plan, selection, decisions)
        steps = summarize(plan, selection, decisions, self.resolver)
        if self.options.json:
            print(json.dumps({"recipe": plan.recipe.name, "steps": [asdict(step) for step in steps]}, indent=1))
        else:
            self.console.plan(plan, steps)
            if any(step.state == "run" for step in steps):
                self.console.say("only the recipe is checked; --check also checks models, data and this machine")
        return 0

    def execute(self, full_plan: Plan, cells: Sequence[Recipe]) -> int:
        """Run the recipe: its plan, or one plan after the other for a search."""
        folder = self.options.runs / full_plan.recipe.name
        plans = search.Search(full_plan, cells, self.resolver, self.console.say, folder)
        run: Run | None = None
        forced_before, failed = frozenset[str](), list[Run]()
        old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        try:
            for plan in plans.plans():
                run = self._prepare(plan, forced_before, checked=cells[0].search is not None)
                forced_before |= self.select(plan).forced
                if run.execute(self.executor):
                    failed.append(run)
                plans.results |= run.results
        except KeyboardInterrupt:
            if run is None or not run.record.steps:
                raise
            self.console.close()
            counts = count_steps(list(run.record.steps.values()))
            text = f"interrupted: {counts}; to continue:\n  {self._resume_command(run)}"
            return _fail(self.options.json, INTERRUPTED, text)
        finally:
            signal.signal(signal.SIGTERM, old_handler)
            if executor := vars(self).get("executor"):
                executor.stop()
            self.console.close()
        assert run is not None
        return self._finish(run, failed)

    def _prepare(self, plan: Plan, forced_before: frozenset[str], checked: bool) -> Run:
        """Prepare a run. Steps that an earlier plan of a search was forced to run are not forced again, and all steps
        of a search are `checked` already."""
        selection = self.select(plan)
        selection = Selection(selection.selected, selection.forced - forced_before)
        executor = None if checked else self.executor
        preparation = prepare(plan, selection, self.store, self.resolver, executor, self.console.say, runs_next=True)
        cached = sum(decision.cached for decision in preparation.decisions.values())
        self.console.say(f"{plan.recipe.name}: {len(plan.steps)} steps, {cached} cached")
        self.console.notes(preparation.notes)
        requests = ((step, request) for step in preparation.steps for request in paid_requests(step, self.resolver))
        self.console.by_stage("asks", ((step.stage, step.name, request) for step, request in requests))
        self._gpu_memory |= preparation.gpu_memory
        decisions = preparation.decisions
        return Run(plan, selection, decisions, self.store, self.resolver, self.console, self._gpu_memory)

    def _finish(self, run: Run, failed: Sequence[Run]) -> int:
        for step, metrics in current_reports(run.plan, run.results):
            self.console.results(run.folder / step, metrics)
        if failed:
            steps = [step for each in failed for step in each.record.steps.values()]
            self.console.failures(steps, self._resume_command(failed[-1]))
        if self.options.json:
            print(json.dumps(asdict(read_run_record(run.folder)), indent=1))
        return 1 if failed else 0

    def _resume_command(self, run: Run) -> str:
        return resume_command(self.options, run.record.without_result(), run.selection.forced)

    @cached_property
    def executor(self) -> Executor:
        if self.options.executor == "local":
            return LocalExecutor(self.options.jobs)
        try:
            from pipeline.run.ray_executor import RayExecutor
        except ImportError as error:
            raise RecipeError([f"--executor ray: {error}; pip install -e '.[ray]'"]) from None
        return RayExecutor(self.options.runs, self.options.jobs)


if __name__ == "__main__":
    sys.exit(main())
