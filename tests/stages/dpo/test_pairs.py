"""Pairs as the trainer gets them: TRL's own tokens, counts by hand, and what TRL's collator makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from stages.base import Context, Input, UserError
from stages.data.dataset_cache import PreparedRows
from stages.dpo.config import DPOStage
from stages.dpo.pairs import EQUAL, TOO_LONG, PairPreparer, kept, load_pairs
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_model

POCKET = Path(__file__).parents[3] / "recipes" / "pocket" / "model"
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = byte_tokenizer().eos_token_id


def step(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl", **section: Any) -> Context:
    """The context of a dpo stage on `rows`, the same for train and eval."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"data": {"train": "./train", "eval": "./eval", **section.pop("data", {})}, **section}
    source = Input(path, fingerprint=str(hash(path.read_text())))
    return Context(
        recipe="r",
        step="dpo",
        config=DPOStage.model_validate(section),
        inputs={"train": source, "eval": source},
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        progress=lambda *_: None,
    )


def loaded(folder: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **section: Any) -> PreparedRows:
    return load_pairs(step(folder, rows, **section), "train", tokenizer or byte_tokenizer())


def ids_of(text: str) -> list[int]:
    """The byte tokenizer's ids; `<end>` is one token."""
    return byte_tokenizer()(text).input_ids


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def assistant(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **more}]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A message with a tool call."""
    return assistant("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])[0]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


TEXTS = [
    {"prompt": "Sky? ", "chosen": "blue", "rejected": "a green one"},
    {"prompt": "Snow? ", "chosen": "white<end>", "rejected": "ré\n"},
]
CHATS = [
    {"prompt": user("Sky?"), "chosen": assistant("blue"), "rejected": assistant("a green one")},
    {"prompt": [*user("Hi"), *assistant("Yes?"), *user("Snow?")], "chosen": assistant("w"), "rejected": assistant("r")},
]
TOOLS = [
    {"prompt": user("Oslo?"), "chosen": [call("weather", city="Oslo")], "rejected": assistant("no")}
    | {"tools": [tool("weather", city={"type": "string"})]},
    {"prompt": user("Noon?"), "chosen": [call("clock", at=12)], "rejected": assistant("x")}
    | {"tools": [tool("clock", at={"type": "number", "minimum": 0})]},
]


@pytest.mark.parametrize(
    ("model", "template", "rows"),
    [
        ("tiny", CHAT_TEMPLATE, TEXTS),
        ("tiny", CHAT_TEMPLATE, CHATS),
        ("tiny", TOOL_TEMPLATE, TOOLS[:1]),
        ("tiny", TOOL_TEMPLATE, TOOLS[1:]),
        ("pocket", None, CHATS),
    ],
    ids=["text", "chat", "tools", "other tools", "pocket"],
)
def test_tokens_are_those_of_trl(tmp_path: Path, model: str, template: str | None, rows: list[dict[str, Any]]) -> None:
    tokenizer = byte_tokenizer() if model == "tiny" else AutoTokenizer.from_pretrained(POCKET)
    tokenizer.chat_template = template or tokenizer.chat_template
    trainer = DPOTrainer(
        model=tiny_model() if model == "tiny" else AutoModelForCausalLM.from_pretrained(POCKET),
        ref_model=tiny_model(),
        args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = {name: trainer.train_dataset[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert loaded(tmp_path / "ours", rows, tokenizer).dataset.to_dict() == expected


def test_tools_of_another_row_change_nothing(tmp_path: Path) -> None:
    """Keys and types differ between the rows."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    together = loaded(tmp_path / "both", TOOLS, tokenizer).dataset.to_list()
    assert together == [loaded(tmp_path / str(i), [row], tokenizer).dataset[0] for i, row in enumerate(TOOLS)]
    assert '"arguments": {"at": 12}' in tokenizer.decode(together[1]["chosen_ids"])


def test_template_variables_of_a_pair(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for d in documents or [] %}{{ d['text'] }}{% endfor %}" + CHAT_TEMPLATE
    row = CHATS[0] | {"documents": [{"text": "[d]"}], "chat_template_kwargs": {"mood": "glad "}}
    (pair,) = loaded(tmp_path, [row], tokenizer).dataset
    assert tokenizer.decode(pair["prompt_ids"]) == "glad [d]user: Sky?\nassistant:"


def test_a_template_that_writes_the_date(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + CHAT_TEMPLATE
    (note,) = loaded(tmp_path, CHATS, tokenizer).notes
    assert note.startswith("the chat template writes the date or time (2")


@pytest.mark.parametrize("template", ["$A <end>", "<pad> $A <end>"], ids=["EOS", "BOS and EOS"])
def test_one_eos_whatever_the_tokenizer_adds(tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    pairs = loaded(tmp_path, TEXTS, tokenizer).dataset
    bos = [tokenizer.pad_token_id] if "<pad>" in template else []
    assert [pair["prompt_ids"] for pair in pairs] == [bos + ids_of("Sky? "), bos + ids_of("Snow? ")]
    assert pairs["chosen_ids"][:] == [ids_of("blue<end>"), ids_of("white<end>")]
    assert pairs["rejected_ids"][:] == [ids_of("a green one<end>"), ids_of("ré\n<end>")]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with one more token: ab."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def test_prompts_that_differ_are_reported(tmp_path: Path) -> None:
    """Before b, the prompt xa is x and a part of ab; before c it is x, a. TRL's rule: both start with x."""
    rows = [{"prompt": "xa", "chosen": "b", "rejected": "c"}, {"prompt": "xa", "chosen": "d", "rejected": "c"}]
    pairs = loaded(tmp_path, rows, tokenizer := merging_tokenizer())
    first, second = ([tokenizer.convert_ids_to_tokens(ids) for ids in pair.values()] for pair in pairs.dataset)
    assert first == [["x"], ["ab", "<end>"], ["a", "c", "<end>"]]
    assert second == [["x", "a"], ["d", "<end>"], ["c", "<end>"]]
    assert (pairs.stats.rows_other_prompt, pairs.stats.tokens_merged, pairs.stats.rows_used) == (1, 1, 2)
    assert pairs.notes == [
        "1 tokens span the boundary between prompt and completion",
        "1 pairs have other prompt tokens before chosen than before rejected, and train on what both start"
        " with as the prompt: rows 1",
    ]


ODD = [
    {"prompt": "p" * 5, "chosen": "yes", "rejected": "no"},  # 9 and 8 tokens with <end>: fits
    {"prompt": "p" * 10, "chosen": "yes", "rejected": "no"},  # the prompt fills max_length
    {"prompt": "p" * 12, "chosen": "yes", "rejected": "no"},
    {"prompt": "p" * 8, "chosen": "ab1", "rejected": "ab2"},  # equal within 10 tokens, 12 each
    {"prompt": "p" * 8, "chosen": "abc", "rejected": "bc"},  # 12 and 11 tokens
    {"prompt": "", "chosen": "b", "rejected": "c"},  # unusable
]


@pytest.mark.parametrize("part", ["train", "eval"])
def test_counts(tmp_path: Path, part: str) -> None:
    context = step(tmp_path, ODD, data={"on_bad_row": "drop"}, train={"max_length": 10})
    pairs = load_pairs(context, part, byte_tokenizer())
    stats = pairs.stats
    assert (stats.rows, stats.rows_used, stats.rows_bad, stats.rows_too_long, stats.rows_equal) == (6, 2, 1, 2, 1)
    assert stats.tokens == 9 + 8 + 10 + 10
    assert stats.tokens_truncated == (14 - 10 + 13 - 10) + (16 - 10 + 15 - 10) + (12 - 10) * 2 + (12 - 10 + 11 - 10)
    assert stats.longest == 10
    assert stats.largest_id == END
    assert len(pairs.dataset) == 2
    assert pairs.dropped == [
        "pairs.jsonl:6: column 'prompt' is empty; fill it or remove the row",
        "pairs.jsonl:2: the prompt fills max_length",
        "pairs.jsonl:3: the prompt fills max_length",
        "pairs.jsonl:4: chosen and rejected are equal within max_length",
    ]
    assert pairs.notes[1:] == [
        "2 pairs left out, because the prompt fills max_length; raise train.max_length; dropped_rows.txt lists them",
        "1 pairs left out, because chosen and rejected are equal within max_length; dropped_rows.txt lists them",
        "25 tokens lie beyond max_length and were cut off",
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ODD[1:3], "2 prompts fill max_length 10, the longest with 12 tokens; raise train.max_length"),
        (ODD[3:4], "chosen and rejected are equal within max_length; raise train.max_length"),
    ],
)
def test_no_pair_left(tmp_path: Path, rows: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(tmp_path, rows, train={"max_length": 10})
    assert str(error.value) == f"no pair of the train data can be used: {expected}"
    assert error.value.key == "train.max_length"


def test_equal_tokens_without_truncation(tmp_path: Path) -> None:
    """A template that trims makes texts equal which differ in white space."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    rows = [{"prompt": user("Sky?"), "chosen": assistant("blue"), "rejected": assistant("blue ")}]
    with pytest.raises(UserError, match="are equal within max_length; check the rows") as error:
        loaded(tmp_path, rows, tokenizer)
    assert error.value.key == "data.train"


def test_rows_that_the_template_cannot_write(tmp_path: Path) -> None:
    rows = [CHATS[0], CHATS[0] | {"tools": [tool("clock")]}]
    with pytest.raises(UserError, match=r"pairs.jsonl:2: has tools, which the model's chat template ignores"):
        loaded(tmp_path, rows)
    pairs = loaded(tmp_path / "drop", rows, data={"on_bad_row": "drop"})
    assert (pairs.stats.rows, pairs.stats.rows_used, pairs.stats.rows_bad) == (2, 1, 1)
    assert [line.split(";")[0] for line in pairs.dropped] == [
        "pairs.jsonl:2: has tools, which the model's chat template ignores"
    ]


def test_weights_of_messages_are_refused(tmp_path: Path) -> None:
    """dpo would ignore them; in the prompt, which nothing learns, they do no harm."""
    harmless = {**CHATS[0], "prompt": [{**user("Sky?")[0], "weight": 0}]}
    assert loaded(tmp_path / "1", [harmless]).dataset[:] == loaded(tmp_path / "2", CHATS[:1]).dataset[:]
    with pytest.raises(UserError, match=r"pairs.jsonl:1: rejected has a message with a weight"):
        loaded(tmp_path / "3", [{**CHATS[0], "rejected": assistant("red", weight=0.5)}])


MODES = ["keep_start", "keep_end"]
ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(prompt=ids, chosen=ids, rejected=ids, max_length=st.integers(1, 9), mode=st.sampled_from(MODES))
def test_truncation_is_that_of_trls_collator(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, mode: str
) -> None:
    """Of pairs that the preparer left as they are, tokens of the letters a, b and c."""
    texts = ["".join("abc"[token] for token in part) for part in (prompt, chosen, rejected)]
    preparer = PairPreparer(byte_tokenizer(), pair_length=max_length, truncation_mode=mode)
    rows = {name: [text] for name, text in zip(("prompt", "chosen", "rejected"), texts, strict=True)} | {"row": [1]}
    (pair,) = preparer(rows, [0]).to_pylist()
    assert pair["prompt_ids"] == ids_of(texts[0])
    prompt, chosen, rejected = (pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
    batch = DataCollatorForPreference(0, max_length, mode)([pair])
    columns = [batch[name].long() for name in ("input_ids", "completion_mask", "attention_mask")]
    rows = [
        (ids[seen == 1].tolist(), is_completion[seen == 1].tolist())
        for ids, is_completion, seen in zip(*columns, strict=True)
    ]
    for completion, row in zip((chosen, rejected), rows, strict=True):
        part, is_completion = (
            kept(len(prompt + completion), max_length, mode),
            [0] * len(prompt) + [1] * len(completion),
        )
        assert row == ((prompt + completion)[part], is_completion[part])
    is_equal = EQUAL if rows[0] == rows[1] else ""
    assert pair["left_out"] == (TOO_LONG if mode == "keep_start" and len(prompt) >= max_length else is_equal)
    assert pair["longest"] == max(len(ids) for ids, _ in rows)
    assert pair["tokens"] == sum(len(ids) for ids, _ in rows)


def test_pairs_of_other_rows(tmp_path: Path) -> None:
    """The rejected completion is another row's; it gets the prompt, the EOS and the counts of any pair."""
    rows = [{"prompt": f"{n}? ", "completion": text} for n, text in enumerate(["red", "blue", "green"])]
    context = step(tmp_path, rows, data={"rejected": "other_row"}, seed=3)
    train, evaluation = (load_pairs(context, part, byte_tokenizer()) for part in ("train", "eval"))
    completions = [ids_of(f"{row['completion']}<end>") for row in rows]
    assert train.dataset["prompt_ids"][:] == [ids_of(row["prompt"]) for row in rows]
    assert train.dataset["chosen_ids"][:] == completions
    for pair in train.dataset:
        assert pair["rejected_ids"] in completions
        assert pair["rejected_ids"] != pair["chosen_ids"]
    assert train.dataset[:] == evaluation.dataset[:]
    draws = [loaded(tmp_path, rows, data={"rejected": "other_row"}, seed=seed).dataset for seed in range(8)]
    assert len({str(pairs["rejected_ids"][:]) for pairs in draws}) > 1
