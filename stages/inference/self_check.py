"""Compares the shared paths of an engine with a plain forward pass: some models compute something else with them."""

import inspect
from typing import Any

import torch

from stages.inference.generation import Batch
from stages.inference.prefix_tree import LEAST_SHARED, Tokens
from stages.inference.requests import GenerationRequest, Score, ScoreRequest
from stages.inference.scoring import TreeScorer

ENDING = 8
"""Tokens that are compared."""
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""dtype -> largest mean difference of a token's log-probability."""
NARROW_TOLERANCE = 0.1
"""That of 16-bit dtypes, which round several hundred times as much."""


def why_plain(model: Any, longest: Tokens, generates: bool) -> str | None:
    """Return why a model has to answer requests one by one; None if it can share passes.

    Args:
        longest: the longest of the requests: a sliding window shows only in texts that are longer.
        generates: whether to check generation, else scoring.
    """
    if not {"position_ids", "logits_to_keep", "past_key_values"} <= set(inspect.signature(model.forward).parameters):
        return "its forward pass takes no positions, cache or logits_to_keep"
    tokens = (longest * (2 * LEAST_SHARED // len(longest) + 1))[: max(len(longest), 2 * LEAST_SHARED)]
    try:
        error = _generation_error(model, tokens) if generates else _scoring_error(model, tokens)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as failure:
        if isinstance(failure, torch.OutOfMemoryError):
            raise
        return f"it fails on shared passes ({type(failure).__name__})"
    tolerance = TOLERANCES.get(model.dtype, NARROW_TOLERANCE)
    if not error <= tolerance:  # not a number is an error as well
        return f"shared passes change a token's log-probability by {error:.2g}, more than {tolerance:g}"
    return None


@torch.inference_mode()
def plain_logits(model: Any, tokens: Tokens) -> torch.Tensor:
    """Return the logits of a plain forward pass, [tokens, vocabulary], in float32."""
    return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()


def score_plainly(model: Any, request: ScoreRequest) -> Score:
    """Score an answer by a plain forward pass."""
    logits = plain_logits(model, request.tokens[:-1])[len(request.prompt) - 1 :]
    answer = torch.tensor(request.answer, device=logits.device)
    log_probs = torch.log_softmax(logits, -1).gather(1, answer[:, None])
    return Score(float(log_probs.sum(dtype=torch.float64)), bool((logits.argmax(-1) == answer).all()))


@torch.inference_mode()
def generate_plainly(model: Any, request: GenerationRequest, tokenizer: Any, eos_ids: list[int]) -> list[int]:
    """Generate an answer by transformers' own `generate`."""
    torch.manual_seed(request.seed)
    ids = torch.tensor([request.prompt], device=model.device)
    sampling = {"temperature": request.temperature, "top_p": 1.0, "top_k": 0} if request.temperature else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.limit,
        do_sample=bool(sampling),
        stop_strings=list(request.stops) or None,
        tokenizer=tokenizer,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        eos_token_id=eos_ids or None,
        **sampling,
    )
    answer: list[int] = output[0, len(request.prompt) :].tolist()
    return answer


def _scoring_error(model: Any, tokens: Tokens) -> float:
    """Score two endings of one prompt both ways."""
    prompt, ending = tokens[:-ENDING], tokens[-ENDING:]
    requests = [ScoreRequest(prompt, ending), ScoreRequest(prompt, (*ending[:1], *ending[:0:-1]))]
    shared: dict[int, Score] = {}
    TreeScorer(model, dict(enumerate(requests)), 4 * ENDING, None, shared.update).run(done=())
    plain = [score_plainly(model, request) for request in requests]
    return max(abs(shared[i].log_prob - plain[i].log_prob) / ENDING for i in range(len(requests)))


def _generation_error(model: Any, tokens: Tokens) -> float:
    """Compare the logits of the last token of two prompts, one of which is padded, and of a token after them."""
    prompts = [tokens[:-1], (*tokens[: -ENDING - 1], *tokens[-ENDING // 2 : -1])]
    batch = Batch(model, prompts)
    errors = [batch.logits - torch.stack([plain_logits(model, prompt)[-1] for prompt in prompts])]
    batch.add(torch.tensor([tokens[-1], tokens[-1]]))
    longer = [(*prompt, tokens[-1]) for prompt in prompts]
    errors.append(batch.logits - torch.stack([plain_logits(model, prompt)[-1] for prompt in longer]))
    differences = torch.cat(errors)
    return float((differences - differences.mean(-1, keepdim=True)).abs().mean(-1).max())
