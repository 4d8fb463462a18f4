"""Write the pocket world: pretraining text, tokenizer, model config, instructions, preferences, benchmarks.

    python recipes/pocket/generate.py [--out DIR]

The files are the same in every run, byte for byte.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exercises import bench_rows, exercises, instruction_rows, preference_rows, reworded_rows
from text import passages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from world import SEED

HERE = Path(__file__).parent

DOCUMENT_TOKENS = 120
"""Longest document of the pretraining text. Shorter passages are joined up to this length."""

PAD, END = "<|pad|>", "<|end|>"
VOCABULARY = 1024

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first and loop.previtem.role == 'assistant' %}{{ '\\n' }}{% endif -%}
{%- if message.role == 'assistant' -%}
{{ 'Assistant: ' + message.content + '<|end|>' }}
{%- elif message.role == 'system' -%}
{{ 'System: ' + message.content + '\\n' }}
{%- else -%}
{{ 'User: ' + message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages and messages[-1].role == 'assistant' %}{{ '\\n' }}{% endif -%}
{{ 'Assistant:' }}
{%- endif -%}
"""

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": END,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def documents(texts: list[str], tokenizer: Tokenizer) -> Iterable[str]:
    """Join passages with newlines into documents of up to `DOCUMENT_TOKENS` tokens."""
    document, length = "", 0
    for text in texts:
        tokens = len(tokenizer.encode(f"\n{text}").ids)
        if document and length + tokens > DOCUMENT_TOKENS:
            yield document
            document, length = "", 0
        document = f"{document}\n{text}" if document else text
        length += tokens
    yield document


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, and print their number."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{path.name}: {len(lines):,} rows")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def generate(out: Path) -> None:
    """Write the folders `out`/data and `out`/init."""
    data, init = out / "data", out / "init"
    data.mkdir(parents=True, exist_ok=True)
    init.mkdir(parents=True, exist_ok=True)

    texts = passages(random.Random(SEED))
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(init / "tokenizer.json"))
    write_json(init / "tokenizer_config.json", TOKENIZER_CONFIG)
    (init / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")
    write_json(init / "config.json", MODEL_CONFIG)

    write_rows(data / "pretrain.jsonl", ({"text": text} for text in documents(texts, tokenizer)))
    drawn = exercises()
    write_rows(data / "instructions.train.jsonl", instruction_rows(drawn.train))
    write_rows(data / "instructions.eval.jsonl", instruction_rows(drawn.eval))
    write_rows(data / "preferences.train.jsonl", preference_rows(drawn.preferences))
    for benchmark in ("knowledge", "reasoning", "instructions"):
        write_rows(data / f"{benchmark}.test.jsonl", bench_rows(drawn.bench, benchmark))
    write_rows(data / "wordings.test.jsonl", reworded_rows(drawn.bench))


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
