"""Tokens, segments and factors of small rows, written by hand: the tokenizer makes one token of each byte."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from stages.base import UserError
from stages.data.chat_rendering import BadRender, learnt_turns, render_chat
from stages.data.segments import Segment, weight_table
from stages.data.tokenization import prepare
from stages.sft.packing import pack
from stages.sft.row_filter import select
from tests.tiny import byte_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# earlier answers lose their reasoning, the last one keeps it
FORGETFUL = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }}</s>{% endif %}{% endfor %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """The byte tokenizer, with another chat template."""
    made = byte_tokenizer()
    if template:
        made.chat_template = template
    return made


def prepared(row: dict[str, Any], template: str | None = None, max_length: int | None = None, **options: Any) -> dict:
    """One row, prepared."""
    return prepare(Dataset.from_list([row]), tokenizer(template), max_length, **options)[0]


def parts(row: dict[str, Any], template: str | None = None, **options: Any) -> list[tuple[str, str]]:
    """The text of a prepared row, cut where the segment changes: [(segment, text), ...]."""
    out = prepared(row, template, **options)
    pairs = zip(out["segments"], out["input_ids"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0])
    decode = tokenizer().decode
    return [(Segment(segment).name.lower(), decode([i for _, i in pairs])) for segment, pairs in groups]


def turns(*contents: str, **extra: Any) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_text_prompt_and_completion_with_eos() -> None:
    assert parts({"prompt": "ab ", "completion": "cd"}) == [("prompt", "ab "), ("completion", "cd<end>")]


def test_eos_is_not_doubled() -> None:
    assert parts({"prompt": "a", "completion": "b<end>"}) == [("prompt", "a"), ("completion", "b<end>")]


def test_plain_text() -> None:
    assert parts({"text": "abc"}) == [("text", "abc<end>")]


def test_prompt_and_completion_of_messages() -> None:
    row = {"prompt": turns("hi"), "completion": [{"role": "assistant", "content": "yo"}]}
    assert parts(row, CHATML) == [
        ("template", "<|im_start|>user\n"),
        ("prompt", "hi"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("completion", "yo<|im_end|>\n"),
    ]


def test_system_words_are_a_segment_of_their_own() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *turns("hi", "yo")]}
    assert parts(row, CHATML)[:3] == [
        ("template", "<|im_start|>system\n"),
        ("system", "Be brief."),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
    ]


@pytest.mark.parametrize(
    ("which", "first"),
    [("all", [("completion", "b<|im_end|>\n")]), ("last", [("prompt", "b"), ("template", "<|im_end|>\n")])],
)
def test_which_turns_are_completion(which: str, first: list) -> None:
    found = parts({"messages": turns("a", "b", "c", "d")}, CHATML, turns=which)
    header = [("template", "<|im_start|>user\n"), ("prompt", "a"), ("template", "<|im_end|>\n<|im_start|>assistant\n")]
    assert found[:3] == header
    merged = [*first, ("template", "<|im_start|>user\n"), ("prompt", "c"), *header[2:], ("completion", "d<|im_end|>\n")]
    joined = [(name, "".join(text for _, text in group)) for name, group in groupby(merged, key=lambda part: part[0])]
    assert found[3:] == joined


def test_words_that_the_template_writes_too() -> None:
    """`user` and `assistant` as contents are found where they stand, not in the headers."""
    found = parts({"messages": turns("user", "assistant")}, CHATML)
    assert found == [
        ("template", "<|im_start|>user\n"),
        ("prompt", "user"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("completion", "assistant<|im_end|>\n"),
    ]


def test_a_template_that_rewrites_earlier_answers() -> None:
    """What is left of the first answer is learnt; what the template took out is not there at all."""
    found = parts({"messages": turns("a", "<think>x</think>b", "c", "<think>y</think>d")}, FORGETFUL)
    assert found == [
        ("template", "[user]"),
        ("prompt", "a"),
        ("template", "[end][assistant]"),
        ("completion", "b[end]"),
        ("template", "[user]"),
        ("prompt", "c"),
        ("template", "[end][assistant]"),
        ("completion", "<think>y</think>d[end]"),
    ]


def test_a_template_without_generation_prompt_that_trims() -> None:
    found = parts({"messages": turns(" a ", "b", "c", "d")}, INST)
    assert found == [
        ("template", "[INST] "),
        ("prompt", "a"),
        ("template", " [/INST]"),
        ("completion", " b</s>"),
        ("template", "[INST] "),
        ("prompt", "c"),
        ("template", " [/INST]"),
        ("completion", " d</s>"),
    ]


def test_a_template_that_writes_the_system_message_only_when_it_prompts() -> None:
    """The prompt of the model and the whole text differ before the user's words; those are no completion for that."""
    template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
        "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *turns("2+2?", "Four.")]
    assert parts({"messages": messages}, template) == [
        ("template", "[INST] "),
        ("prompt", "2+2?"),
        ("template", "[/INST]"),
        ("completion", " Four.</s>"),
    ]


TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.mark.parametrize("which", ["all", "last"])
def test_the_templates_of_known_models(which: str) -> None:
    """Two turns, the answers with their reasoning or without: what is learnt are the answers, and never a question.
    Refused are only templates that take other contents than text, or none that begin so."""
    refused = []
    for path in TEMPLATES:
        made = tokenizer(path.read_text())
        made.bos_token, made.unk_token = "<bos>", "<unk>"
        for answer in ("ANSWER{}", "<think>\nREASON{}\n</think>\n\nANSWER{}"):
            messages = turns("QUESTION1", answer.format(1, 1), "QUESTION2", answer.format(2, 2))
            try:
                rendered = render_chat(made, messages, learnt_turns(messages, which))
            except BadRender:
                refused.append(path.stem)
                continue
            pairs = zip(rendered.text, rendered.segments, strict=True)
            learnt = "".join(letter for letter, segment in pairs if segment == Segment.COMPLETION)
            assert ("ANSWER1" in learnt, "ANSWER2" in learnt) == (which == "all", True), path.stem
            assert "QUESTION" not in learnt, path.stem
    assert len(TEMPLATES) > 30
    with_pictures = {"idefics3", "llava_next", "smolvlm"}
    assert {name.removesuffix("_training") for name in refused} <= {"glm4moe", *with_pictures}, refused


def test_calls_that_the_template_does_not_write_are_refused() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    rows = turns("time?", "")
    rows[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(UserError, match="row 1: has tool_calls, of which the model's chat template writes nothing"):
        prepared({"messages": rows}, CHATML)
    with pytest.raises(UserError, match="row 1: has tools, of which the model's chat template writes nothing"):
        prepared({"messages": turns("a", "b"), "tools": [{"name": "clock"}]}, CHATML)


def test_gaps_that_arrow_fills_are_no_values() -> None:
    """Two calls with other arguments: as one Arrow column each has both, one of them None."""
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"a": {key: 1}}]},
            ]
        }
        for key in ("x", "y")
    ]
    made = prepare(Dataset.from_list(rows), tokenizer(template), None)
    assert tokenizer().decode(made[1]["input_ids"]) == 'q;[{"a": {"y": 1}}];'


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"content": "no role"}]},
        {"messages": turns("alone")},
        {"prompt": "a", "completion": None},
        {"prompt": "", "completion": ""},
        {"input_ids": [1], "loss_weights": [None]},
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": -1.0}]},
        {"messages": turns("a", "b"), "tools": "[broken"},
    ],
)
def test_rows_that_are_no_rows_are_named(row: dict[str, Any]) -> None:
    blank = byte_tokenizer()
    with pytest.raises(UserError, match=r"^row 1: "):
        prepare(Dataset.from_list([row] if row.get("completion", 1) else [row | {"completion": None}]), blank, None)


def test_tool_calls_are_completion_and_tool_answers_are_prompt() -> None:
    template = (
        "{% if tools %}<tools>{{ tools[0].name }}</tools>{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}call {{ call.function.name }}{% endfor %}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    found = parts({"messages": messages, "tools": [{"name": "clock"}]}, template)
    assert found == [
        ("template", "<tools>clock</tools><user>"),
        ("prompt", "time?"),
        ("template", "</><assistant>"),
        ("completion", "call clock</>"),
        ("template", "<tool>"),
        ("prompt", "noon"),
        ("template", "</><assistant>"),
        ("completion", "It is noon.</>"),
    ]


def test_a_messages_own_weight_multiplies() -> None:
    """Of an answer with the end of its turn, of a prompt with its words alone."""
    messages = turns("a", "b", "c", "d")
    messages[0]["weight"], messages[1]["weight"] = 0.5, 0.0
    out = prepared({"messages": messages}, FORGETFUL)
    text = "[user]a[end][assistant]b[end][user]c[end][assistant]d[end]"
    expected = [1.0] * len(text)
    expected[text.index("a[")] = 0.5
    expected[text.index("b[end]") : text.index("b[end]") + len("b[end]")] = [0.0] * 6
    assert tokenizer().decode(out["input_ids"]) == text
    assert out["factors"] == expected


def test_letters_of_several_bytes() -> None:
    """Each byte of é is a token; all of them belong where the letter stands."""
    assert prepared({"prompt": "é", "completion": "é"})["segments"] == [0, 0, 1, 1, 1]


def test_truncation_keeps_the_start_and_is_counted() -> None:
    out = prepared({"prompt": "abc", "completion": "def"}, max_length=4)
    assert (out["segments"], out["cut"]) == ([0, 0, 0, 1], 3)


def test_a_token_over_the_boundary_is_completion_and_is_counted() -> None:
    merging = tokenizer()
    merging.add_tokens(["bc"])
    out = prepare(Dataset.from_list([{"prompt": "ab", "completion": "cd"}]), merging, None)[0]
    assert merging.convert_ids_to_tokens(out["input_ids"]) == ["a", "bc", "d", "<end>"]
    assert (out["segments"], out["merged"]) == ([0, 1, 1, 1], 1)


def test_tokens_with_weights_of_their_own() -> None:
    out = prepared({"input_ids": [5, 6, 7], "loss_weights": [1.0, 0.0, 0.25]})
    assert (out["input_ids"], out["segments"], out["factors"]) == ([5, 6, 7], [Segment.GIVEN] * 3, [1.0, 0.0, 0.25])


def test_rows_that_the_template_refuses_are_named_or_dropped() -> None:
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    rows = Dataset.from_list([{"messages": turns("a", "b")}, {"messages": turns("a", "b")[1:]}])
    with pytest.raises(UserError, match=r"^data\.jsonl:2: the chat template refuses the conversation: user first$"):
        prepare(rows, tokenizer(refusing), None, place="data.jsonl:")
    kept = prepare(rows, tokenizer(refusing), None, on_bad_row="drop")
    assert [bool(ids) for ids in kept["input_ids"]] == [True, False]
    assert "user first" in kept[1]["problem"]


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(UserError, match="the data has the columns answer, question; rows hold prompt and completion"):
        prepare(Dataset.from_list([{"question": "a", "answer": "b"}]), tokenizer(), None)


def test_what_is_used_is_counted() -> None:
    """At max_length 4 the second row has no completion left: at (0, 1) it is left out, at (1, 1) it stays."""
    rows = Dataset.from_list([{"prompt": "ab", "completion": "c"}, {"prompt": "abcdef", "completion": "g"}])
    made = prepare(rows, tokenizer(), max_length=4)  # "abc<end>", and "abcd" of "abcdefg<end>"
    kept, used = select(made, weight_table(0, 1))
    assert (len(kept), used.rows, used.rows_used, used.rows_without_weight) == (1, 2, 1, 1)
    assert (used.tokens, used.tokens_dropped, used.tokens_truncated) == (4, 4, 4)
    assert used.weighted == {"completion": 2}
    kept, used = select(made, weight_table(1, 1))
    assert (len(kept), used.tokens, used.weighted) == (2, 8, {"prompt": 1 + 3, "completion": 2})


def test_a_row_whose_own_weights_are_all_zero_is_left_out() -> None:
    rows = Dataset.from_list(
        [{"input_ids": [5, 6], "loss_weights": [1.0, 0.0]}, {"input_ids": [5, 6], "loss_weights": [0.0, 0.5]}]
    )
    kept, used = select(prepare(rows, tokenizer(), None), weight_table(0, 1))
    assert (kept["row"][:], used.weighted) == ([2], {"given": 1})


def test_one_preparation_serves_all_weights() -> None:
    """What is prepared does not depend on the weights."""
    rows = Dataset.from_list([{"prompt": "ab", "completion": "c"}])
    made = prepare(rows, tokenizer(), None)
    assert select(made, weight_table(0, 1))[0][0]["segments"] == select(made, weight_table(1, 0))[0][0]["segments"]


def test_packing_fills_rows_and_splits_none() -> None:
    """Best fit decreasing by hand: lengths 4, 3, 2, 1 into rows of 5 are 4 + 1 and 3 + 2."""
    rows = [{"input_ids": [n] * n, "loss_weights": [0.5 * n] * n} for n in (1, 2, 3, 4)]
    packs = pack(prepare(Dataset.from_list(rows), tokenizer(), None), 5)
    assert packs["input_ids"][:] == [[4, 4, 4, 4, 1], [3, 3, 3, 2, 2]]
    assert packs["seq_lengths"][:] == [[4, 1], [3, 2]]
    assert packs["factors"][:] == [[2.0, 2.0, 2.0, 2.0, 0.5], [1.5, 1.5, 1.5, 1.0, 1.0]]
    assert packs["row"][:] == [[4, 4, 4, 4, 1], [3, 3, 3, 2, 2]]
