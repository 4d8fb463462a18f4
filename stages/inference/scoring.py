"""Scores answers over a prefix tree: a shared prefix is computed once, and many continuations in one pass."""

from collections.abc import Callable, Container, Mapping
from typing import Any, Generic, TypeVar

import numpy
import torch
from torch import Tensor

from stages.inference.growing_cache import growing_cache
from stages.inference.prefix_tree import Node, Pass, passes, prefix_tree
from stages.inference.requests import Score, ScoreRequest

Key = TypeVar("Key")


class TreeScorer(Generic[Key]):
    """The state of one walk through the tree of some requests, which have a key each."""

    def __init__(
        self,
        model: Any,
        requests: Mapping[Key, ScoreRequest],
        budget: int,
        softmax_dtype: torch.dtype | None,
        on_scores: Callable[[dict[Key, Score]], None],
    ) -> None:
        self.model, self.requests, self.budget = model, requests, budget
        self.softmax_dtype, self.on_scores = softmax_dtype, on_scores
        inputs = {key: request.tokens[:-1] for key, request in requests.items()}
        self.sequences = sorted(set(inputs.values()))
        places = {sequence: place for place, sequence in enumerate(self.sequences)}
        self.requests_of: list[list[Key]] = [[] for _ in self.sequences]
        """Sequence -> the requests that it is the input of."""
        for key, sequence in inputs.items():
            self.requests_of[places[sequence]].append(key)
        self.log_probs = dict.fromkeys(requests, 0.0)
        self.is_greedy = dict.fromkeys(requests, True)
        self.remaining = {key: len(request.answer) for key, request in requests.items()}
        """Request -> tokens of its answer that are not scored yet."""
        self.done: Container[Key] = ()

    @torch.inference_mode()
    def run(self, done: Container[Key]) -> None:
        """Score all requests whose key is not in `done`. `on_scores` gets the scores that a pass completes.

        The passes do not depend on what is done, so that an interrupted walk ends with the same scores, to the bit.
        """
        cache = growing_cache()
        kept, self.done = list[bool](), done
        for each in passes(prefix_tree(self.sequences), self.sequences, self.budget):
            if each.action == "forget":
                if kept.pop():
                    for layer in cache.layers:
                        layer.crop(-len(each.nodes[0].tokens))
                continue
            places = (place for node in each.nodes for place in range(node.first, node.stop))
            is_needed = not all(key in done for place in places for key in self.requests_of[place])
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
        targets: dict[int, list[tuple[Key, int]]] = {}
        """Position in the row -> requests, with the token of their answer that follows there."""
        for (node, _), start in zip(nodes, starts, strict=True):
            for place in range(node.first, node.stop):
                last = min(node.end, len(self.sequences[place]))
                for key in self.requests_of[place]:
                    request = self.requests[key]
                    for position in range(max(node.start, len(request.prompt) - 1), last):
                        token = request.answer[position + 1 - len(request.prompt)]
                        targets.setdefault(start + position - node.start, []).append((key, token))
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

    def _count(self, logits: Tensor, targets: list[list[tuple[Key, int]]]) -> None:
        """Add the log-probabilities of tokens; logits are [positions, vocabulary]."""
        log_probs = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
        best = log_probs.argmax(-1).tolist()
        pairs = [(row, key, token) for row, each in enumerate(targets) for key, token in each]
        rows, keys, tokens = zip(*pairs, strict=True)
        values = log_probs[list(rows), list(tokens)].tolist()
        completed: dict[Key, Score] = {}
        for row, key, token, value in zip(rows, keys, tokens, values, strict=True):
            self.log_probs[key] += value
            self.is_greedy[key] &= best[row] == token
            self.remaining[key] -= 1
            if not self.remaining[key] and key not in self.done:
                completed[key] = Score(self.log_probs[key], self.is_greedy[key])
        if completed:
            self.on_scores(completed)
