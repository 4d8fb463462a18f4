"""The gradient of template tokens: python -m benchmarks.template_tokens

Trains nothing. On 128 instruction rows, the pocket base model's gradient norm for each segment alone, and at the
weights (0.2, 0.8) with and without template tokens: with its own chat template, and with one that it has not seen.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.data import machine
from stages.data.reader import Reading, read_examples
from stages.data.segments import Segment, weights_by_segment
from stages.data.tokenization import Preparer, prepare
from stages.sft.collator import WeightedCollator
from stages.sft.row_filter import select

POCKET = Path(__file__).parent.parent / "recipes" / "pocket"
ROWS, BATCH = 128, 16
UNSEEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gradient(model: torch.nn.Module, rows: Dataset, weights: list[float], pad_id: int) -> torch.Tensor:
    """Return the gradient of the WIT loss over all rows, as one vector."""
    model.zero_grad()
    collator = WeightedCollator(pad_token_id=pad_id, segment_weights=weights)
    batches = [collator(list(itertools.islice(rows, start, start + BATCH))) for start in range(0, len(rows), BATCH)]
    count = sum(int((batch["loss_weights"][:, 1:] != 0).sum()) for batch in batches)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        ((nll * batch["loss_weights"][:, 1:]).sum() / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def main() -> None:
    """Print the table."""
    print(machine())
    model = AutoModelForCausalLM.from_pretrained(POCKET / "model", dtype=torch.float32)
    examples = read_examples(POCKET / "data" / "instructions.train.jsonl", Reading())
    raw = Dataset.from_list([row.columns() for _, row in itertools.islice(examples, ROWS)])
    print("template   template tokens   prompt  template  completion   (0.2, 0.8)   without template   cosine")
    for name in ("its own", "unseen"):
        tokenizer = AutoTokenizer.from_pretrained(POCKET / "model")
        if name == "unseen":
            tokenizer.chat_template = UNSEEN
        rows = prepare(raw, Preparer(tokenizer, None))
        counts = select(rows, weights_by_segment(1, 1))[1].weighted
        norms = {}
        for segment in (Segment.PROMPT, Segment.TEMPLATE, Segment.COMPLETION):
            weights = [float(segment == each) for each in Segment]
            norms[segment] = gradient(model, rows, weights, tokenizer.pad_token_id or 0).norm().item()
        whole = gradient(model, rows, weights_by_segment(0.2, 0.8), tokenizer.pad_token_id or 0)
        without = gradient(model, rows, weights_by_segment(0.2, 0.8, template=0), tokenizer.pad_token_id or 0)
        cosine = torch.nn.functional.cosine_similarity(whole, without, dim=0).item()
        shares = counts["template"] / sum(counts.values())
        values = "  ".join(f"{norm:>8.2f}" for norm in norms.values())
        print(f"{name:<10} {shares:>15.0%}  {values} {whole.norm():>12.2f} {without.norm():>18.2f} {cosine:>8.2f}")


if __name__ == "__main__":
    main()
