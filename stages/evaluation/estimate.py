"""Cost of an evaluation, from its requests and the size of its model."""

from functools import partial
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from stages.estimate.result import Disk, Estimate, EstimateInputs, Memory, Remedy, attempt
from stages.evaluation.config import BUDGETS, FEWEST_TOKENS, GENERATION_TOKENS, EvaluationStage
from stages.models.model_size import build, model_size, saved_activations

EVALUATION_PROCESS = 530 * 2**20
"""Bytes. Measured: the peak of `python -m benchmarks.estimate "lm_eval 30M"` less the other parts."""
BYTES_PER_TOKEN = 40  # on disk, for an answer or sample
LOGIT_COPIES = 3  # logits, their log-softmax, and the log-softmax of the batch before


class Request(NamedTuple):
    """A text, the most tokens of its answer, and the tokens of all answers that a second pass scores after it."""

    text: str
    generated: int = 0
    scored: int = 0


def estimate(stage: EvaluationStage, inputs: EstimateInputs) -> Estimate:
    """Estimate the cost of an evaluation, of which `requests` of its kind lists the requests. Raises UserError."""
    values = inputs.values()
    if "model" not in inputs.paths or not stage.has("requests"):
        return Estimate(**values)
    options: Any = stage.options  # type: ignore[attr-defined]
    path, trusted = inputs.paths["model"], stage.trust_remote_code
    model = build(path, inputs.dtype if options.dtype == "auto" else options.dtype, trusted)
    size = model_size(model)
    values["parameters"] = size.base
    read_requests = partial(stage.load("requests"), stage, inputs)
    requests = None if inputs.missing else attempt(values["unknown"], "requests and memory", read_requests)
    if not requests:
        return Estimate(**values)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    read = [len(ids) for ids in tokenizer([request.text for request in requests])["input_ids"]]
    tokens = sum(n + r.generated + (n + r.scored) * bool(r.scored) for n, r in zip(read, requests, strict=True))
    longest = max(n + r.generated for n, r in zip(read, requests, strict=True))
    flops, scores = 2.0 * size.multiplied * tokens, any(r.scored or not r.generated for r in requests)
    generated = max(request.generated for request in requests)
    memory_of = partial(_memory, stage, inputs, model, scores, longest, generated * len(requests))
    budget = options.batch_size or BUDGETS[inputs.device]
    values["memory"] = memory = attempt(values["unknown"], "memory", lambda: memory_of(budget))
    for smaller in (budget >> halvings for halvings in range(1, (budget // FEWEST_TOKENS).bit_length())):
        if memory and memory.total > inputs.room >= (total := memory_of(smaller).total):
            values["remedies"] = [Remedy(changes=[f"options.batch_size: {smaller}"], memory=total, same_result=True)]
            break
    values |= {"requests": len(requests), "tokens": tokens, "flops": flops, "formula": "2 N for each token"}
    return Estimate(**values, **inputs.duration(flops, stage.processes), disk=Disk(published=BYTES_PER_TOKEN * tokens))


def _memory(
    stage: EvaluationStage, inputs: EstimateInputs, model: Any, scores: bool, longest: int, generated: int, budget: int
) -> Memory:
    """Return the bytes on each device for passes of `budget` tokens over the longest requests."""
    text, on_cpu, weights = model.config.get_text_config(), inputs.device == "cpu", model_size(model).weights
    layers = text.num_hidden_layers
    layer = saved_activations(model, 1, budget) // layers // 2  # a forward pass frees about half of it
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = longest + min(GENERATION_TOKENS * budget, longest * generated)
    cache = 2 * layers * heads * head_size * model.dtype.itemsize * tokens
    gpus = int(max(1, stage.resources.gpus or 1)) if not on_cpu and stage.processes == 1 else 1
    memory = Memory(
        weights=weights // gpus,
        activations=layer + cache // gpus,
        logits=4 * text.vocab_size * (LOGIT_COPIES * budget if scores else GENERATION_TOKENS * budget // longest),
        libraries=EVALUATION_PROCESS if on_cpu else 0,
    )
    loading = EVALUATION_PROCESS + 2 * weights if on_cpu else 0  # the file beside the model
    return memory.model_copy(update={"loading": max(0, loading - memory.total)})
