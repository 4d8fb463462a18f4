"""Requests of an `lm_eval` stage."""

from stages.estimate.result import EstimateInputs
from stages.evaluation.estimate import Request
from stages.lm_eval.config import LMEvalStage
from stages.lm_eval.tasks import load_benchmarks
from stages.lm_eval.trusted_code import only_trusted_code


def requests(stage: LMEvalStage, inputs: EstimateInputs) -> list[Request]:
    """Lm-eval builds its requests, without a chat template."""
    requests = []
    with only_trusted_code(stage):
        benchmarks = load_benchmarks(stage, inputs.paths, inputs.scratch)
        for task in (task for benchmark in benchmarks for task in benchmark.tasks.values()):
            task.build_all_requests(limit=stage.options.limit)
            options = (task.config.generation_kwargs or {}) | stage.options.gen_kwargs.model_dump()
            for instance in task.instances:
                generated = options.get("max_gen_toks", 256) if instance.request_type == "generate_until" else 0
                requests.append(Request("".join(arg for arg in instance.args if isinstance(arg, str)), generated))
    return requests
