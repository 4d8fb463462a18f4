"""A causal language model that answers prompts and scores answers, in batches of token ids.

For stages that need the tokens themselves. Benchmarks use lm-eval's own model.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.base import UserError
from stages.data.chat_rendering import TEMPLATE_SECONDS
from stages.models.appended_eos import remove_appended_eos
from stages.models.generation_config import remove_generation_defaults
from stages.models.model_folder import why_not_loaded
from stages.system.limits import LimitExceeded, limited

Tokens = list[int]


class LanguageModel:
    """A checkpoint with its tokenizer, on the first GPU or on the CPU.

    Args:
        path: a folder that from_pretrained loads. Weights are read from safetensors only.
        dtype: dtype of the weights: auto, float32, bfloat16 or float16.
    """

    def __init__(self, path: Path, name: str, dtype: str, trust_remote_code: bool) -> None:
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
            self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be loaded: {why_not_loaded(error)}") from None
        self.name = name
        remove_appended_eos(self.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()  # type: ignore[arg-type]
        self.removed_defaults = remove_generation_defaults(self.model)
        """What the checkpoint's generation config would have set."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos_ids = eos if isinstance(eos, list) else [eos, self.tokenizer.eos_token_id]
        self.eos_ids = {token for token in eos_ids if token is not None}
        """Tokens that end an answer."""
        pad_ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad_id = next(token for token in pad_ids if token is not None)
        self.max_length: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        """Longest sequence in tokens. None if the model's config names none."""
        parameters = inspect.signature(self.model.forward).parameters
        self._has_position_ids = "position_ids" in parameters
        self._last_logits_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def environment(self) -> dict[str, Any]:
        """Describe library, dtype, device and context length for a stage's metrics."""
        return {
            "transformers": metadata.version("transformers"),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "max_length": self.max_length,
            "removed_generation_defaults": self.removed_defaults,
        }

    def encode(self, messages: Sequence[dict[str, str]] | str) -> Tokens:
        """Tokenize plain text, or messages in the chat template with its generation prompt."""
        if isinstance(messages, str):
            return list(self.tokenizer(messages)["input_ids"])
        if not self.tokenizer.chat_template:
            raise UserError(
                f"options.apply_chat_template: the tokenizer of {self.name} has no chat template; set it to false, or"
                " add a template to the model"
            )
        try:
            with limited(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (Exception, LimitExceeded) as error:  # templates raise errors of any type
            raise UserError(f"the chat template of {self.name} rejects the prompt: {error}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Tokens) -> str:
        """Return the text of an answer without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def check_length(self, prompt: Tokens, max_new_tokens: int, place: str) -> None:
        """Raise UserError, which names `place`, if `prompt` and its answer exceed the model's context."""
        if self.max_length is not None and len(prompt) + max_new_tokens > self.max_length:
            raise UserError(
                f"{place}: {len(prompt)} tokens and an answer of {max_new_tokens} are more than the {self.max_length}"
                f" of {self.name}'s context; shorten the prompt, or lower max_new_tokens"
            )

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tokens], max_new_tokens: int, batch_size: int, temperature: float = 0.0
    ) -> list[Tokens]:
        """Generate an answer to each prompt: greedily, or sampled at `temperature` with torch's global generator.

        Returns:
            For each prompt 1 to `max_new_tokens` tokens. The first token in `eos_ids` is the last of the answer.
        """
        answers: list[Tokens] = [[] for _ in prompts]
        for batch in _batches(prompts, [1] * len(prompts), batch_size):
            ids, mask = self._padded([prompts[i] for i in batch], "left")
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=1.0 if temperature else None,
                top_k=0 if temperature else None,
                pad_token_id=self.pad_id,
                eos_token_id=sorted(self.eos_ids) or None,
            )
            for row, i in enumerate(batch):
                tokens = output[row, ids.shape[1] :].tolist()
                end = next((n for n, token in enumerate(tokens) if token in self.eos_ids), len(tokens) - 1)
                answers[i] = tokens[: end + 1]
        return answers

    @torch.inference_mode()
    def log_probs(
        self, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], batch_size: int
    ) -> list[list[float]]:
        """Compute log p(answer | prompt) for each of a prompt's own answers.

        The answers of a prompt share its keys and values, which are computed once. Logits are in float32.

        Args:
            prompts: N prompts, none empty.
            answers: N lists of answers, none empty.
            batch_size: number of answers per batch.

        Returns:
            N lists: for each answer the sum over its tokens, in natural logarithms.
        """
        log_probs: list[list[float]] = [[] for _ in prompts]
        chunks = [  # a prompt with more than batch_size answers is computed again for each chunk of them
            (i, list(prompt_answers[start : start + batch_size]))
            for i, prompt_answers in enumerate(answers)
            for start in range(0, len(prompt_answers), batch_size)
        ]
        for batch in _batches([prompts[i] for i, _ in chunks], [len(chunk) for _, chunk in chunks], batch_size):
            sums = iter(self._score([prompts[chunks[k][0]] for k in batch], [chunks[k][1] for k in batch]))
            scores = {k: [next(sums) for _ in chunks[k][1]] for k in batch}
            for k in sorted(scores):
                log_probs[chunks[k][0]] += scores[k]
        return log_probs

    def _score(self, prompts: list[Tokens], answers: list[list[Tokens]]) -> list[float]:
        """Score one batch; the sums of all prompts' answers in one list."""
        ids, mask = self._padded(prompts, "left")
        prefix = self.model(
            input_ids=ids, attention_mask=mask, use_cache=True, **self._positions(mask), **self._last_logits_only
        )
        rows = torch.tensor([row for row, chunk in enumerate(answers) for _ in chunk], device=self.device)
        labels, label_mask = self._padded([answer for chunk in answers for answer in chunk], "right")
        logits = prefix.logits[:, -1:].float()[rows]
        if labels.shape[1] > 1:
            if (cache := prefix.get("past_key_values")) is None:
                raise UserError(f"{self.name} returns no keys and values, which scoring needs; use another model")
            cache.batch_select_indices(rows)
            full_mask = torch.cat([mask[rows], label_mask[:, :-1]], 1)
            positions = {name: value[:, mask.shape[1] :] for name, value in self._positions(full_mask).items()}
            output = self.model(input_ids=labels[:, :-1], attention_mask=full_mask, past_key_values=cache, **positions)
            logits = torch.cat([logits, output.logits.float()], 1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (-(losses * label_mask).sum(1, dtype=torch.float64)).tolist()

    def _padded(self, sequences: list[Tokens], side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both [len(sequences), longest]."""
        rows = [torch.tensor(tokens) for tokens in sequences]
        pad = partial(pad_sequence, batch_first=True, padding_side=side)
        ids, mask = pad(rows, padding_value=self.pad_id), pad([torch.ones_like(row) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def _positions(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions that skip the padding, as generate computes them, if the model's forward accepts them."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self._has_position_ids else {}


def _batches(prompts: Sequence[Tokens], sizes: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group indices, longest prompts first; the `sizes` in a batch of several sum to at most `batch_size`."""
    batch: list[int] = []  # the longest first: memory that runs out does so at once
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if batch and sum(sizes[k] for k in batch) + sizes[i] > batch_size:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
