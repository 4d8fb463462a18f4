"""How much a forward and backward pass holds at its peak, found by running it on tensors without content.

torch's FakeTensorMode computes shapes and types alone, so that a pass of any size costs no memory; what each operation
makes is counted while something refers to it, as an allocator would.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from stages.sft.head import Head, weighted_nll

FEW_LAYERS = (2, 4)
"""A deeper model is run with so many layers, and what a layer adds is counted for the rest."""


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made within that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peaks = [0]
        """The most of each phase."""
        self._known: set[int] = set()

    def phase(self) -> None:
        """A further phase begins."""
        self.peaks.append(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in given | self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peaks[-1] = max(self.peaks[-1], self.live)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond weights and optimiser: the most of the pass up to half of its backward part, and of the rest."""

    early: float
    late: float

    @property
    def most(self) -> int:
        """The peak of the whole."""
        return round(max(self.early, self.late))


def traced(config: Any, run: Callable[[Any], Peaks]) -> Peaks:
    """The peaks of `run`, which is given a config of a model to build.

    What a layer adds in each half is the same for every layer of a decoder; the peak itself is not linear in them, for
    it moves from where the activations are to where the gradients are.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers <= max(FEW_LAYERS):
        return run(config)
    few, more = (run(with_layers(config, count)) for count in FEW_LAYERS)
    rest = (layers - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    return Peaks(few.early + rest * (more.early - few.early), few.late + rest * (more.late - few.late))


def with_layers(config: Any, count: int) -> Any:
    """The config of the same model with so many layers."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers and name != "architectures":
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return shorter


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass, or with `trains=False` a forward pass alone."""

    build: Callable[[Any], Any]
    """A causal language model from its config."""
    rows: int
    length: int
    """In tokens, of every row."""
    head: Literal["none", "wit", "trl", "full", "last"]
    """What follows the backbone: nothing, stages.sft.head, TRL's fused head, logits and their log-softmax, or the
    logits of the last tokens."""
    trains: bool = True
    reference: bool = False
    """Whether a pass without gradient follows, as DPO's of the reference."""
    accumulates: bool = False
    """Whether gradients of earlier passes are held."""
    bfloat16: bool = False
    """Whether it runs under autocast."""
    softmax: torch.dtype | None = torch.float32
    """Of the log-softmax; None takes that of the logits."""

    def peaks(self, config: Any) -> Peaks:
        """What it holds beyond weights."""
        return traced(config, self._run)

    def without_head(self) -> Pass:
        """The same of the backbone alone."""
        return replace(self, head="none", reference=False)

    def _run(self, config: Any) -> Peaks:
        with FakeTensorMode():
            model = self.build(config)
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            if self.head == "trl":
                add_fused_lm_head(base)
            held = Held()
            middle = _middle(base, held)
            with held, torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                for _ in range(2 if self.accumulates and self.trains else 1):
                    held.peaks = [held.live]
                    self._pass(model, base)
            if middle is not None:
                middle.remove()
            return Peaks(held.peaks[0], max(held.peaks[1:], default=0))

    def _pass(self, model: Any, base: Any) -> None:
        ids = torch.zeros(self.rows, self.length, dtype=torch.long)
        # as it is made of the padding, or of the places where packed examples begin; one whole row needs none
        mask = torch.ones(self.rows, 1, self.length, self.length, dtype=torch.bool) if self.rows > 1 else None
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with torch.set_grad_enabled(self.trains):
            loss = self._loss(model, base, given)
            if self.reference:
                with torch.no_grad():
                    self._loss(model, base, given)
            if self.trains:
                loss.backward()

    def _loss(self, model: Any, base: Any, given: dict[str, Any]) -> Tensor:
        if self.head == "trl":
            return base(**given, labels=given["input_ids"], fused_lm_head=True).log_probs.sum()
        if self.head == "full":
            return torch.log_softmax(base(**given).logits, dim=-1, dtype=self.softmax)
        if self.head == "last":
            return base(**given, logits_to_keep=1).logits
        hidden = base.base_model(**given).last_hidden_state[:, :-1]
        if self.head == "none":
            return hidden.sum()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        count = len(hidden)
        targets, weights = torch.zeros(count, dtype=torch.long), torch.ones(count)
        linear = base.get_output_embeddings()
        return weighted_nll(hidden, linear.weight, linear.bias, targets, weights, Head(), True)[0]


def _middle(model: Any, held: Held) -> Any:
    """Let a phase of `held` begin when the backward pass is through half of the layers."""
    layers = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1), None)
    if layers is None:
        return None

    def attach(_module: Any, _given: Any, made: Any) -> None:
        hidden = made[0] if isinstance(made, tuple) else made
        if hidden.requires_grad:
            hidden.register_hook(lambda _: held.phase())

    return layers[len(layers) // 2 - 1].register_forward_hook(attach)
