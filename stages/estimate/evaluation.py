"""What a stage that asks a model takes: its weights, and a batch of the longest requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoTokenizer

from stages.base import UserError
from stages.characteristics.config import CharacteristicsStage
from stages.estimate.result import Disk, Estimate, Given, Memory, Remedy
from stages.estimate.sizes import build, dtype_of, read_config, sizes
from stages.estimate.speed import NO_ROOM, measured
from stages.estimate.trace import Pass
from stages.evaluation.config import EvaluationStage
from stages.judge.config import JudgeStage
from stages.judge.questions import read_instructions, read_questions
from stages.lm_eval.config import LMEvalStage
from stages.sensitivity.config import SensitivityStage
from stages.sensitivity.sets import read_sets

BYTES_PER_TOKEN = 40
"""About what a kept answer or sample takes on disk."""


@dataclass(frozen=True)
class Asked:
    """What the model is asked, all of it."""

    requests: int
    read: int
    """Tokens that it reads."""
    made: int
    """Tokens that it generates at most."""
    longest: int
    """Tokens of the longest request, with what is generated for it."""
    scores: bool = True
    """Whether it asks for the probability of texts: of answers alone, only the last token's logits are made."""


def estimate(stage: EvaluationStage, given: Given) -> Estimate:
    """All that can be known of the stage from what is here."""
    found = Estimate(room=given.room, room_of=given.room_of)
    if "model" not in given.paths:
        found.unknown.append(f"parameters, memory, requests and time: {given.missing['model']}")
        return found
    options: Any = stage.options  # type: ignore[attr-defined]
    config = read_config(given.paths["model"], stage.trust_remote_code)
    named = (given.dtype or "auto") if options.dtype == "auto" else options.dtype
    dtype = dtype_of({"dtype": named}, config)
    sized = sizes(config, dtype, trusted=stage.trust_remote_code)
    found.parameters = sized.base
    asked = _asked(stage, given, found)
    longest = _most(stage, config) if asked is None else asked.longest
    if longest is None:
        found.unknown.append("memory: the model's config does not say how long a request may be")
        return found
    if asked is None:
        found.notes.append(f"memory is for requests of {longest} tokens, the longest that the model takes")
    scores = not isinstance(stage, JudgeStage) if asked is None else asked.scores
    memory = partial(_memory, stage, config, longest, given, scores)
    try:
        batch = min(options.batch_size, asked.requests) if asked else options.batch_size
        found.memory = memory(batch, dtype)
        if found.fits is False:
            found.remedies = list(_remedies(memory, batch, dtype, given.room))
    except Exception as error:  # a model's own forward pass may do whatever it likes
        found.unknown.append(f"memory: the model's forward pass cannot be traced without weights: {error}")
    if asked is None:
        _as_before(given, found)
        return found
    found.requests, found.tokens = asked.requests, asked.read + asked.made
    found.disk = Disk(published=BYTES_PER_TOKEN * found.tokens)
    found.flops, found.formula = 2 * sized.multiplied * found.tokens, "2 N for each token"
    if not _as_before(given, found):
        speed = measured(config, given.device, given.threads, longest, False, False, given.room)
        if speed is None:
            found.unknown.append(NO_ROOM)
            return found
        found.seconds = found.flops / speed / stage.processes
        found.speed = f"{speed / 1e9:.1f} GFLOP/s, measured on a few layers of the model just now"
        if asked.made:
            found.notes.append("time is for whole batches; answers are generated token by token, which takes longer")
    return found


def _as_before(given: Given, found: Estimate) -> bool:
    if given.finished:
        found.seconds, found.speed = (
            given.finished.seconds,
            f"as {given.finished.step} took",
        )
    return given.finished is not None


def _most(stage: EvaluationStage, config: Any) -> int | None:
    limit = getattr(stage.options, "max_length", None)  # type: ignore[attr-defined]
    return limit or getattr(config.get_text_config(), "max_position_embeddings", None)


def _memory(
    stage: EvaluationStage, config: Any, longest: int, given: Given, scores: bool, batch: int, dtype: Any
) -> Memory:
    """Logits of a whole batch and their log-softmax, in the model's dtype by lm-eval, in float32 by others; or those of
    the last tokens. Keys and values of as many tokens. Split over GPUs where one process has several."""
    make = partial(build, dtype=dtype, trusted=stage.trust_remote_code)
    weights = sizes(config, dtype, trusted=stage.trust_remote_code).weights
    softmax = None if isinstance(stage, LMEvalStage) else torch.float32
    whole = Pass(make, batch, longest, head="full" if scores else "last", trains=False, softmax=softmax)
    most, without = whole.peaks(config).most, whole.without_head().peaks(config).most
    logits = max(0, most - without)
    text = config.get_text_config()
    if scores and isinstance(stage, LMEvalStage):  # lm-eval holds those of one batch until the next has its own
        logits += batch * longest * text.vocab_size * dtype.itemsize
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * size * dtype.itemsize * whole.rows * longest
    if given.device == "cuda" and stage.processes == 1:
        gpus = stage.resources.gpus or 1
        weights, cache = weights // gpus, cache // gpus
    libraries = given.libraries if given.device == "cpu" else 0
    memory = Memory(weights=weights, activations=without + cache, logits=logits, libraries=libraries)
    loading = libraries + 2 * weights if given.device == "cpu" else 0
    return memory.model_copy(update={"loading": max(0, loading - memory.total)})


def _remedies(memory: Callable[[int, Any], Memory], batch: int, dtype: Any, room: int) -> Iterator[Remedy]:
    """Smaller batches; weights in bfloat16, with smaller batches where need be."""
    halves = [batch // parts for parts in (1, 2, 4, 8, 16, 32, 64, 128) if batch // parts]
    for named in (dtype, torch.bfloat16) if dtype.itemsize > 2 else (dtype,):
        for size in halves:
            if (found := memory(size, named).total) <= room:
                changes = [] if named is dtype else ["options.dtype: bfloat16"]
                changes += [f"options.batch_size: {size}"] if size < batch else []
                yield Remedy(changes=changes, memory=found, same_result=named is dtype)
                break


def _asked(stage: EvaluationStage, given: Given, found: Estimate) -> Asked | None:
    """What is asked, where the files are here; else None, and why."""
    if lacking := [f"{name}: {why}" for name, why in given.missing.items()]:
        found.unknown.append(f"requests, tokens and time: {'; '.join(lacking)}")
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(given.paths["model"], trust_remote_code=stage.trust_remote_code)
        count = lambda texts: [len(ids) for ids in tokenizer(texts)["input_ids"]]  # noqa: E731
        return _READERS[type(stage)](stage, given, count)
    except Exception as error:  # tasks and their data raise what they like
        if isinstance(error, UserError) and error.key:
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found.unknown.append(f"requests, tokens and time: {line}")
        return None


Count = Callable[[list[str]], list[int]]
"""Texts -> tokens of each."""


def _of_lm_eval(stage: LMEvalStage, given: Given, count: Count) -> Asked:
    """lm-eval's own requests, without a chat template."""
    from stages.lm_eval.tasks import load_benchmarks
    from stages.lm_eval.trusted_code import only_trusted_code

    read, made, generated, scores = [], 0, 0, False
    with only_trusted_code(stage):
        for benchmark in load_benchmarks(stage, given.paths, given.scratch):
            for task in benchmark.tasks.values():
                task.build_all_requests(limit=stage.options.limit)
                for request in task.instances:
                    read.append("".join(part for part in request.args if isinstance(part, str)))
                    if request.request_type == "generate_until":
                        own = (task.config.generation_kwargs or {}) | stage.options.gen_kwargs.model_dump()
                        generated = max(generated, own.get("max_gen_toks", 256))
                        made += own.get("max_gen_toks", 256)
                    else:
                        scores = True
    tokens = count(read)
    return Asked(len(read), sum(tokens), made, max(tokens) + generated, scores)


def _of_sensitivity(stage: SensitivityStage, given: Given, count: Count) -> Asked:
    """Every prompt is answered, and every answer scored after every prompt of its set."""
    requests = read = made = longest = 0
    for prompts in stage.prompts:
        for each in read_sets(prompts, given.paths, stage.seed):
            tokens = count([asked.text(stage.options.system_instruction) for asked in each.asked])
            answers = len(tokens) ** 2 * prompts.max_new_tokens
            requests, read = requests + len(tokens), read + 2 * sum(tokens) + answers
            made += len(tokens) * prompts.max_new_tokens
            longest = max(longest, max(tokens) + prompts.max_new_tokens)
    return Asked(requests, read, made, longest)


def _of_judge(stage: JudgeStage, given: Given, count: Count) -> Asked:
    """What the model answers; the judge's part is told by --plan."""
    prompts: list[str] = []
    options, before = stage.options, 0
    if stage.mt_bench:
        questions = read_questions(given.paths, options.limit)
        prompts += [text for q in questions for text in (q.turns[0], f"{q.turns[0]} {q.turns[1]}")]
        before = options.max_new_tokens
    if stage.alpaca_eval:
        prompts += [each.instruction for each in read_instructions(given.paths, options.limit)]
    tokens = count(prompts)
    made = len(prompts) * options.max_new_tokens
    return Asked(len(prompts), sum(tokens), made, max(tokens) + before + options.max_new_tokens, scores=False)


def _of_characteristics(stage: CharacteristicsStage, given: Given, count: Count) -> Asked:
    """Every row is read once."""
    texts = [
        " ".join(map(str, row.columns().values()))
        for each in stage.sets
        for row in stage.rows(each, given.paths[f"data.{each.name}"])
    ]
    tokens = count(texts)
    return Asked(len(tokens), sum(tokens), 0, max(tokens))


_READERS: dict[type, Callable[[Any, Given, Count], Asked]] = {
    LMEvalStage: _of_lm_eval,
    SensitivityStage: _of_sensitivity,
    JudgeStage: _of_judge,
    CharacteristicsStage: _of_characteristics,
}
