"""Scores answers over a prefix tree: a shared prefix is computed once, and many continuations in one pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from stages.inference.growing_cache import growing_cache
from stages.inference.prefix_tree import Node, Pass, passes, prefix_tree
from stages.inference.requests import Score, ScoreRequest


class TreeScorer:
    """The state of one walk through the tree of some requests."""

    def __init__(
        self,
        model: Any,
        requests: Sequence[ScoreRequest],
        budget: int,
        softmax_dtype: torch.dtype | None,
        on_scores: Callable[[dict[int, Score]], None],
    ) -> None:
        self.model, self.requests, self.budget = model, requests, budget
        self.softmax_dtype, self.on_scores = softmax_dtype, on_scores
        inputs = [request.tokens[:-1] for request in requests]
        self.sequences = sorted(set(inputs))
        places = {sequence: place for place, sequence in enumerate(self.sequences)}
        self.requests_of: list[list[int]] = [[] for _ in self.sequences]
        """Sequence -> the requests that it is the input of."""
        for number, sequence in enumerate(inputs):
            self.requests_of[places[sequence]].append(number)
        self.log_probs = [0.0] * len(requests)
        self.is_greedy = [True] * len(requests)
        self.remaining = [len(request.answer) for request in requests]
        """Request -> tokens of its answer that are not scored yet."""
        self.done: Sequence[bool] = ()

    @torch.inference_mode()
    def run(self, done: Sequence[bool]) -> None:
        """Score all requests but those that are done. `on_scores` gets the scores that a pass completes.

        The passes do not depend on what is done, so that an interrupted walk ends with the same scores, to the bit.
        """
        cache, kept, self.done = growing_cache(), list[bool](), done
        for each in passes(prefix_tree(self.sequences), self.sequences, self.budget):
            if each.action == "forget":
                if kept.pop():
                    for layer in cache.layers:
                        layer.crop(-len(each.nodes[0].tokens))
                continue
            places = (place for node in each.nodes for place in range(node.first, node.stop))
            is_needed = not all(done[number] for place in places for number in self.requests_of[place])
            if is_needed:
                self._read(each, cache)
            if each.action == "keep":
                kept.append(is_needed)

    def _read(self, each: Pass, cache: Any) -> None:
        if each.action == "keep":
            (node,) = each.nodes
            for start in range(0, len(node.tokens), self.budget):
                part = node.tokens[start : start + self.budget]
                self._forward([(Node(part, node.start + start, node.first, node.stop), -1)], each.known + start, cache)
            return
        nodes: list[tuple[Node, int]] = []
        for top in each.nodes:
            offset = len(nodes)
            nodes += [(node, parent + offset if parent >= 0 else -1) for node, parent in top.below()]
        self._forward(nodes, each.known, cache)
        for layer in cache.layers:
            layer.crop(-sum(len(node.tokens) for node, _ in nodes))

    def _forward(self, nodes: list[tuple[Node, int]], known: int, cache: Any) -> None:
        """Read nodes, each after its parent's index, in one pass over one row, and count what they score."""
        ends = numpy.cumsum([len(node.tokens) for node, _ in nodes]).tolist()
        starts = [end - len(node.tokens) for end, (node, _) in zip(ends, nodes, strict=True)]
        targets: dict[int, list[tuple[int, int]]] = {}
        """Position in the row -> requests, with the token of their answer that follows there."""
        for (node, _), start in zip(nodes, starts, strict=True):
            for place in range(node.first, node.stop):
                last = min(node.end, len(self.sequences[place]))
                for number in self.requests_of[place]:
                    request = self.requests[number]
                    for position in range(max(node.start, len(request.prompt) - 1), last):
                        token = request.answer[position + 1 - len(request.prompt)]
                        targets.setdefault(start + position - node.start, []).append((number, token))
        positions = [position for node, _ in nodes for position in range(node.start, node.end)]
        mask = None
        if len(nodes) > 1:
            mask = self._mask(starts, ends, [parent for _, parent in nodes], known)
        tokens = torch.tensor([[token for node, _ in nodes for token in node.tokens]], device=self.model.device)
        rows = torch.tensor(sorted(targets) or [len(positions) - 1], device=self.model.device)
        output = self.model(
            input_ids=tokens,
            position_ids=torch.tensor([positions], device=self.model.device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        if targets:
            self._count(output.logits[0], [targets[row] for row in sorted(targets)])

    def _mask(self, starts: list[int], ends: list[int], parents: list[int], known: int) -> Tensor:
        """Which tokens a token of a pack attends to, [1, 1, tokens, known + tokens]: those that come before it."""
        own = numpy.zeros((ends[-1], ends[-1]), dtype=bool)
        for start, end, parent in zip(starts, ends, parents, strict=True):
            if parent >= 0:
                own[start:end] = own[ends[parent] - 1]
            own[start:end, start:end] = numpy.tri(end - start, dtype=bool)
        before = numpy.ones((ends[-1], known), dtype=bool)
        mask = torch.from_numpy(numpy.concatenate([before, own], 1))[None, None].to(self.model.device)
        if self.model.config._attn_implementation != "eager":
            return mask
        # eager attention adds its mask to the scores: it would take False for 0
        dtype = self.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _count(self, logits: Tensor, targets: list[list[tuple[int, int]]]) -> None:
        """Add the log-probabilities of tokens; logits are [positions, vocabulary]."""
        log_probs = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
        best = log_probs.argmax(-1).tolist()
        pairs = [(row, number, token) for row, each in enumerate(targets) for number, token in each]
        rows, numbers, tokens = zip(*pairs, strict=True)
        values = log_probs[list(rows), list(tokens)].tolist()
        completed: dict[int, Score] = {}
        for row, number, token, value in zip(rows, numbers, tokens, values, strict=True):
            self.log_probs[number] += value
            self.is_greedy[number] &= best[row] == token
            self.remaining[number] -= 1
            if not self.remaining[number] and not self.done[number]:
                completed[number] = Score(self.log_probs[number], self.is_greedy[number])
        if completed:
            self.on_scores(completed)
