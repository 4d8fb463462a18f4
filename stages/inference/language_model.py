"""A causal language model that answers prompts and scores answers, many at a time, as token ids.

For stages that need the tokens themselves; benchmarks go through lm-eval's own model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.base import UserError
from stages.models.model_folder import why_not_loaded

Tokens = list[int]


class LanguageModel:
    """The checkpoint in `path`, from safetensors only.

    Args:
        path: a folder that from_pretrained loads.
        name: what messages call it.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        trust_remote_code: whether the folder's own Python files may run.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, path: Path, name: str, dtype: str, trust_remote_code: bool) -> None:
        try:
            self.tokenizer = cast(
                PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            )
            self.model = cast(
                PreTrainedModel,
                AutoModelForCausalLM.from_pretrained(
                    path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
                ),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be loaded: {why_not_loaded(error)}") from None
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()  # type: ignore[arg-type]
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = eos if isinstance(eos, list) else [eos, self.tokenizer.eos_token_id]
        self.ends = {token for token in ends if token is not None}
        """The tokens that end an answer."""
        pads = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad = next(token for token in pads if token is not None)
        self.max_length: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        """The longest sequence in tokens; None where the model's config names none."""
        self._takes = inspect.signature(self.model.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}

    def environment(self) -> dict[str, Any]:
        """What it runs with, for a stage's metrics."""
        return {
            "transformers": metadata.version("transformers"),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "max_length": self.max_length,
        }

    def encode(self, messages: Sequence[dict[str, str]] | str) -> Tokens:
        """Messages, in the chat template up to where the answer begins, or plain text, as tokens.

        Raises UserError where the tokenizer has no template for them.
        """
        if isinstance(messages, str):
            return list(self.tokenizer(messages)["input_ids"])
        if not self.tokenizer.chat_template:
            raise UserError(
                f"options.apply_chat_template: the tokenizer of {self.name} has no chat template; evaluate it without,"
                " or give the model one"
            )
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise UserError(f"the chat template of {self.name} refuses the prompt: {error}") from None
        return list(self.tokenizer(cast(str, text), add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Tokens) -> str:
        """The text of an answer, without its special tokens."""
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    def check_length(self, prompt: Tokens, max_new_tokens: int, place: str) -> None:
        """Raise UserError where `prompt` and its answer are longer than the model's context."""
        if self.max_length is not None and len(prompt) + max_new_tokens > self.max_length:
            raise UserError(
                f"{place}: {len(prompt)} tokens and an answer of {max_new_tokens} are more than the {self.max_length}"
                f" that {self.name} takes; shorten it, or lower max_new_tokens"
            )

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tokens], max_new_tokens: int, batch_size: int, temperature: float = 0.0
    ) -> list[Tokens]:
        """The next tokens for each prompt: the likeliest one after another, or drawn at a temperature by torch's seed.

        Returns:
            For each prompt the new tokens: up to the first that ends an answer, which is the last of them, or
            `max_new_tokens`. At least one.
        """
        answers: list[Tokens] = [[] for _ in prompts]
        for batch in _batches(prompts, [1] * len(prompts), batch_size):
            ids, mask = self._padded([prompts[i] for i in batch], left=True)
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=1.0 if temperature else None,
                top_k=0 if temperature else None,
                pad_token_id=self.pad,
                eos_token_id=sorted(self.ends) or None,
            )
            for row, i in enumerate(batch):
                answers[i] = self._until_end(out[row, ids.shape[1] :].tolist())
        return answers

    def _until_end(self, tokens: Tokens) -> Tokens:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: end + 1]

    @torch.inference_mode()
    def log_probs(
        self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], batch_size: int
    ) -> list[list[float]]:
        """log p(answer | prompt) for every one of a prompt's own list of answers.

        A prompt is computed once for all its answers, which go on from its keys and values. Logits are in float32.

        Args:
            prompts: N of them, none empty.
            answers: N lists, of answers that are not empty.
            batch_size: of answers computed together.

        Returns:
            For each prompt the sums over each answer's tokens, in natural logarithms.
        """
        found: list[list[float]] = [[] for _ in prompts]
        parts = [  # a prompt with more answers than a batch holds is computed again for each part
            (i, list(given[start : start + batch_size]))
            for i, given in enumerate(answers)
            for start in range(0, len(given), batch_size)
        ]
        for batch in _batches([prompts[i] for i, _ in parts], [len(given) for _, given in parts], batch_size):
            chosen = [parts[k] for k in batch]
            sums = iter(self._score([prompts[i] for i, _ in chosen], [given for _, given in chosen]))
            scored = {k: [next(sums) for _ in parts[k][1]] for k in batch}
            for k in sorted(scored):
                found[parts[k][0]] += scored[k]
        return found

    def _score(self, prompts: list[Tokens], answers: list[list[Tokens]]) -> list[float]:
        """The sums for one batch, one list after another."""
        ids, mask = self._padded(prompts, left=True)
        known = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **self._places(mask), **self._last)
        rows = torch.tensor([row for row, given in enumerate(answers) for _ in given], device=self.device)
        flat = [answer for given in answers for answer in given]
        labels, real = self._padded(flat, left=False)
        logits = known.logits[:, -1:].float()[rows]
        if labels.shape[1] > 1:
            if (cache := known.get("past_key_values")) is None:
                raise UserError(f"{self.name} keeps no keys and values of a prompt, from which answers could go on")
            cache.batch_select_indices(rows)
            whole = torch.cat([mask[rows], real[:, :-1]], 1)
            places = {name: each[:, mask.shape[1] :] for name, each in self._places(whole).items()}
            out = self.model(input_ids=labels[:, :-1], attention_mask=whole, past_key_values=cache, **places)
            logits = torch.cat([logits, out.logits.float()], 1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (-(losses * real).sum(1, dtype=torch.float64)).tolist()

    def _padded(self, sequences: list[Tokens], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, both [len(sequences), longest], padded on one side."""
        longest = max(map(len, sequences))
        gaps = [[self.pad] * (longest - len(tokens)) for tokens in sequences]
        ids = [[*gap, *tokens] if left else [*tokens, *gap] for gap, tokens in zip(gaps, sequences, strict=True)]
        ones = [[0] * len(gap) + [1] * len(tokens) for gap, tokens in zip(gaps, sequences, strict=True)]
        mask = ones if left else [row[::-1] for row in ones]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _places(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The positions of the tokens that count, for a model that does not find them by the mask, as generate does."""
        if "position_ids" not in self._takes:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _batches(prompts: Sequence[Tokens], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """The places of `prompts`, longest first, so that little is padded and memory runs out at once if at all.

    A batch holds as many as keep the sum of their `sizes` within `most`, or one.
    """
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if batch and sum(sizes[k] for k in batch) + sizes[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
