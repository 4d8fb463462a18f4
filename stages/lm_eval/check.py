"""Check an `lm_eval` stage before it runs: its model, and every task with its data, metric and few-shot examples."""

from typing import NamedTuple

from stages.base import Context, Findings, UserError
from stages.evaluation.check import check_model
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.tasks import Benchmark, load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code
from stages.models.generation_config import is_in_range
from stages.models.model_size import position_limit

DEFAULT_LENGTH = 256
"""lm-eval's max_gen_toks of a task that names none."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the longest answer in a task's generation_kwargs; the first that is set counts, as in lm-eval."""

Notes = list[tuple[str, str]]


class _Generation(NamedTuple):
    """A task whose answers are generated: its place in the recipe, its name, and the tokens of its longest answer."""

    key: str
    task: str
    length: int


_CHECKED: dict[str, tuple[Findings, list[_Generation]]] = {}
"""Settings and files of tasks -> what was found: the steps of a stage differ in their models only."""


def check(context: Context, on_this_machine: bool) -> Findings:
    """Check a step. Tasks whose data set is on the hub download it, as the run would."""
    config: LMEvalStage = context.config
    files = {name: source.path for name, source in context.inputs.items() if name != "model"}
    key = repr((config.model_copy(update={"models": []}).model_dump_json(), files))
    if key not in _CHECKED:
        shared, generations = _CHECKED[key] = Findings(), list[_Generation]()
        with shared.part("metrics", "tasks"), only_trusted_code(config):
            for i, benchmark in enumerate(load_benchmarks(config, files, context.scratch, shared.part)):
                generations += _generations(config, benchmark, f"tasks.{i}.task", shared.notes)
                if not benchmark.config.data and not benchmark.config.dataset:
                    shared.tasks += [f"{name} {benchmark.config.split or ''}" for name in benchmark.tasks]
    shared, generations = _CHECKED[key]
    findings = shared.model_copy(deep=True)
    check_model(context, findings)
    with findings.part("length of answers"):
        _check_lengths(context, generations)
    return findings


def _generations(config: LMEvalStage, benchmark: Benchmark, key: str, notes: Notes) -> list[_Generation]:
    """The tasks that generate answers. Raises UserError if a setting of theirs cannot be used."""
    generations = []
    for name, task in benchmark.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        ours = config.options.gen_kwargs.model_dump()
        settings = (task.config.generation_kwargs or {}) | ours
        until = settings.get("until") or []
        if wrong := [stop for stop in (until if isinstance(until, list) else [until]) if not isinstance(stop, str)]:
            at = "options.gen_kwargs.until" if "until" in ours else key
            raise UserError(f"generation_kwargs of {name}: until has {wrong[0]!r}, which is not text; quote it", at)
        for option, value in settings.items():
            at = f"options.gen_kwargs.{option}" if option in ours else key
            is_greedy = option == "temperature" and value == 0
            if value is not None and not is_greedy and not is_in_range(option, value):
                raise UserError(f"{option} of {name} is {value!r}, with which nothing can be generated", at)
            if option == "max_time":
                notes.append((at, f"{name} ends answers after {value} s, so its score depends on the machine"))
        lengths = {each: settings[each] for each in LENGTHS if settings.get(each) is not None} or {"": DEFAULT_LENGTH}
        option, length = next(iter(lengths.items()))
        generations.append(_Generation(f"options.gen_kwargs.{option}" if option in ours else key, name, int(length)))
    return generations


def _check_lengths(context: Context, generations: list[_Generation]) -> None:
    """Raise UserError if an answer leaves no room for its prompt."""
    config: LMEvalStage = context.config
    limit = config.options.max_length or position_limit(context.inputs["model"].path, config.trust_remote_code)[0]
    for generation in generations:
        if limit is not None and generation.length >= limit:
            raise UserError(
                f"{generation.task} generates up to {generation.length} tokens, which leaves no room for a prompt in"
                f" the {limit} tokens of {config.models[0]}; set options.gen_kwargs.max_gen_toks to less",
                generation.key,
            )
