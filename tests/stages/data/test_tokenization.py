"""Tokens, segments and weight multipliers of small rows, by hand: the tokenizer makes one token of each byte."""

from __future__ import annotations

from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from stages.base import UserError
from stages.data.chat_rendering import render_chat, target_turns
from stages.data.files import BadRow
from stages.data.segments import Segment, describe_shares, segment_shares, weights_by_segment
from stages.data.tokenization import Preparer, date_notes, dates_in, prepare
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
    fast = byte_tokenizer()
    if template:
        fast.chat_template = template
    return fast


def prepared(row: dict[str, Any], template: str | None = None, max_length: int | None = None, **options: Any) -> dict:
    """One row, prepared."""
    return prepare(Dataset.from_list([row]), Preparer(tokenizer(template), max_length, **options))[0]


def parts(row: dict[str, Any], template: str | None = None, **options: Any) -> list[tuple[str, str]]:
    """The text of a prepared row, split where the segment changes: [(segment, text), ...]."""
    out = prepared(row, template, **options)
    pairs = zip(out["segments"], out["input_ids"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0])
    decode = tokenizer().decode
    return [(Segment(segment).name.lower(), decode([i for _, i in pairs])) for segment, pairs in groups]


def turns(*contents: str) -> list[dict[str, Any]]:
    """A conversation that alternates between user and assistant."""
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
    segments = parts({"messages": turns("a", "b", "c", "d")}, CHATML, turns=which)
    header = [("template", "<|im_start|>user\n"), ("prompt", "a"), ("template", "<|im_end|>\n<|im_start|>assistant\n")]
    assert segments[:3] == header
    expected = [
        *first,
        ("template", "<|im_start|>user\n"),
        ("prompt", "c"),
        *header[2:],
        ("completion", "d<|im_end|>\n"),
    ]
    joined = [(name, "".join(text for _, text in group)) for name, group in groupby(expected, key=lambda part: part[0])]
    assert segments[3:] == joined


def test_words_that_the_template_writes_too() -> None:
    """`user` and `assistant` as contents are not confused with the headers."""
    segments = parts({"messages": turns("user", "assistant")}, CHATML)
    assert segments == [
        ("template", "<|im_start|>user\n"),
        ("prompt", "user"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("completion", "assistant<|im_end|>\n"),
    ]


def test_a_template_that_rewrites_earlier_answers() -> None:
    """The part of the first answer that the template keeps is completion."""
    segments = parts({"messages": turns("a", "<think>x</think>b", "c", "<think>y</think>d")}, FORGETFUL)
    assert segments == [
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
    segments = parts({"messages": turns(" a ", "b", "c", "d")}, INST)
    assert segments == [
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
    """The model would see the system words only when it is asked, never in training."""
    template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
        "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *turns("2+2?", "Four.")]
    with pytest.raises(UserError, match=r"row 1: the chat template leaves out text of m.* 1 \(system\): 'Be brief.'"):
        prepared({"messages": messages}, template)


TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.mark.parametrize("which", ["all", "last"])
def test_the_templates_of_known_models(which: str) -> None:
    """Of two turns, with or without reasoning, the answers are completion and the questions are not. Only templates
    for pictures, and one that needs other messages, are refused."""
    refused = []
    for path in TEMPLATES:
        fast = tokenizer(path.read_text())
        fast.bos_token, fast.unk_token = "<bos>", "<unk>"
        for answer in ("ANSWER{}", "<think>\nREASON{}\n</think>\n\nANSWER{}"):
            messages = turns("QUESTION1", answer.format(1, 1), "QUESTION2", answer.format(2, 2))
            try:
                rendered = render_chat(fast, messages, target_turns(messages, which))
            except BadRow:
                refused.append(path.stem)
                continue
            pairs = zip(rendered.text, rendered.segments, strict=True)
            completion = "".join(letter for letter, segment in pairs if segment == Segment.COMPLETION)
            assert ("ANSWER1" in completion, "ANSWER2" in completion) == (which == "all", True), path.stem
            assert "QUESTION" not in completion, path.stem
    assert len(TEMPLATES) > 30
    for_pictures = {"idefics3", "llava_next", "smolvlm"}
    without_reasoning = {"deepseek_r1_distill", "deepseekv3"}  # they cut it off, of the last answer, too
    assert {name.removesuffix("_training") for name in refused} <= without_reasoning | for_pictures, refused


def test_tool_calls_that_the_template_ignores_are_refused() -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    rows = turns("time?", "")
    rows[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(UserError, match=r"leaves out tool calls of message 2 \(assistant\): \['clock'\]"):
        prepared({"messages": rows}, CHATML)
    rows[1] |= {"content": "The clock says nine."}
    with pytest.raises(UserError, match=r"leaves out tool calls of message 2 \(assistant\): \['clock'\]"):
        prepared({"messages": rows}, CHATML)  # the answer has the name of the call
    first_only = CHATML + "{{ messages[1].tool_calls[0] | tojson if messages[1].tool_calls }}"
    rows[1] |= {"tool_calls": [call, call]}
    with pytest.raises(UserError, match=r"leaves out tool calls of message 2 \(assistant\)"):
        prepared({"messages": rows}, first_only)
    with pytest.raises(UserError, match="row 1: has tools, which the model's chat template ignores"):
        prepared({"messages": turns("a", "b"), "tools": [{"name": "clock"}]}, CHATML)


def test_none_that_arrow_adds_is_ignored() -> None:
    """Two calls with different arguments: in one Arrow column each has both, one of them None."""
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
    prepared_rows = prepare(Dataset.from_list(rows), Preparer(tokenizer(template), None))
    assert tokenizer().decode(prepared_rows[1]["input_ids"]) == 'q;[{"a": {"y": 1}}];'


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"content": "no role"}]},
        {"messages": turns("alone")},
        {"prompt": "a", "completion": None},
        {"prompt": "", "completion": ""},
        {"input_ids": [1], "loss_weights": [None]},
        {"input_ids": [-1], "loss_weights": [1.0]},
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": -1.0}]},
        {"messages": turns("a", "b"), "tools": "[broken"},
    ],
)
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any]) -> None:
    blank = byte_tokenizer()
    with pytest.raises(UserError, match=r"^row 1: "):
        prepare(
            Dataset.from_list([row] if row.get("completion", 1) else [row | {"completion": None}]),
            Preparer(blank, None),
        )


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
    segments = parts({"messages": messages, "tools": [{"name": "clock"}]}, template)
    assert segments == [
        ("template", "<tools>clock</tools><user>"),
        ("prompt", "time?"),
        ("template", "</><assistant>"),
        ("completion", "call clock</>"),
        ("template", "<tool>"),
        ("prompt", "noon"),
        ("template", "</><assistant>"),
        ("completion", "It is noon.</>"),
    ]


def test_the_weight_of_a_message_multiplies() -> None:
    """Over an answer including the end of its turn; over a prompt's words only."""
    messages = turns("a", "b", "c", "d")
    messages[0]["weight"], messages[1]["weight"] = 0.5, 0.0
    out = prepared({"messages": messages}, FORGETFUL)
    text = "[user]a[end][assistant]b[end][user]c[end][assistant]d[end]"
    expected = [1.0] * len(text)
    expected[text.index("a[")] = 0.5
    expected[text.index("b[end]") : text.index("b[end]") + len("b[end]")] = [0.0] * 6
    assert tokenizer().decode(out["input_ids"]) == text
    assert out["factors"] == expected


def test_completions_without_a_stop_token_are_counted() -> None:
    """CHATML ends answers with text that is not this tokenizer's EOS; a truncated row says nothing about its end."""
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "b" * 90)}, {"messages": turns("a", "b<end>")}]
    data = prepare(Dataset.from_list(rows), Preparer(tokenizer(CHATML), 80))
    stop = tokenizer().eos_token_id
    assert select(data, weights_by_segment(0, 1), {stop})[1].rows_without_stop == 1
    assert select(data, weights_by_segment(0, 1))[1].rows_without_stop == 0


def test_the_share_of_template_tokens() -> None:
    """A token is a byte: 17 before the user's words, 33 after them, 13 of the answer. Nothing predicts the first."""
    data = prepare(Dataset.from_list([{"messages": turns("hi", "yo")}]), Preparer(tokenizer(CHATML), None))
    stats = select(data, weights_by_segment(0.2, 0.8))[1]
    assert stats.weighted == {"prompt": 2, "completion": 13, "template": 49}
    shares = segment_shares(stats.weighted)
    assert shares == {"prompt": 0.0312, "completion": 0.2031, "template": 0.7656}
    assert describe_shares(shares).startswith(
        "the weighted tokens are 77% template, 20% completion, 3% prompt; the chat"
    )
    assert describe_shares({"prompt": 0.75, "template": 0.25}) == "the weighted tokens are 75% prompt, 25% template"
    assert select(data, weights_by_segment(0.2, 0.8, template=0))[1].weighted == {"prompt": 2, "completion": 13}


def test_documents_and_template_variables_of_a_row_reach_the_template() -> None:
    template = "{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ mood }}" + CHATML
    row = {"messages": turns("a", "b"), "documents": [{"text": "fact"}], "chat_template_kwargs": {"mood": "calm"}}
    assert parts(row, template)[0] == ("template", "[fact]calm<|im_start|>user\n")
    with pytest.raises(UserError, match="row 1: has documents, which the model's chat template ignores"):
        prepared(row, CHATML)


def test_rows_of_a_template_that_writes_the_date_are_cached_for_a_day() -> None:
    dated, plain = tokenizer("{{ strftime_now('%d %B %Y') }};" + CHATML), tokenizer(CHATML)
    today = datetime.now().strftime("%d %B %Y")
    assert dates_in(dated.chat_template) == [today]
    assert [today] in Preparer(dated, None).key()
    assert [] in Preparer(plain, None).key()
    row = {"messages": turns("a", "b")}
    (note,) = date_notes(dated, prepare(Dataset.from_list([row]), Preparer(dated, None))[0]["input_ids"])
    assert note.startswith(f"the chat template writes the date or time ({today})")
    assert date_notes(plain, prepared(row, CHATML)["input_ids"]) == []


def test_characters_of_several_bytes() -> None:
    """Each byte of é is a token; all have the segment of the character."""
    assert prepared({"prompt": "é", "completion": "é"})["segments"] == [0, 0, 1, 1, 1]


def test_truncation_keeps_the_start_and_is_counted() -> None:
    out = prepared({"prompt": "abc", "completion": "def"}, max_length=4)
    assert (out["segments"], out["cut"]) == ([0, 0, 0, 1], 3)


def test_a_boundary_token_is_completion_and_is_counted() -> None:
    merging = tokenizer()
    merging.add_tokens(["bc"])
    out = prepare(Dataset.from_list([{"prompt": "ab", "completion": "cd"}]), Preparer(merging, None))[0]
    assert merging.convert_ids_to_tokens(out["input_ids"]) == ["a", "bc", "d", "<end>"]
    assert (out["segments"], out["merged"]) == ([0, 1, 1, 1], 1)


def test_pretokenised_rows() -> None:
    out = prepared({"input_ids": [5, 6, 7], "loss_weights": [1.0, 0.0, 0.25]})
    assert (out["input_ids"], out["segments"], out["factors"]) == ([5, 6, 7], [Segment.GIVEN] * 3, [1.0, 0.0, 0.25])


def test_rows_that_the_template_refuses_are_named_or_dropped() -> None:
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    rows = Dataset.from_list([{"messages": turns("a", "b")}, {"messages": turns("a", "b")[1:]}])
    with pytest.raises(UserError, match=r"^data\.jsonl:2: the chat template refuses the conversation: user first$"):
        prepare(rows, Preparer(tokenizer(refusing), None), place="data.jsonl:{}".format)
    good = prepare(rows, Preparer(tokenizer(refusing), None), on_bad_row="drop")
    assert [bool(ids) for ids in good["input_ids"]] == [True, False]
    assert "user first" in good[1]["problem"]


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(UserError, match="the data has the columns answer, question; rows need prompt and completion"):
        prepare(Dataset.from_list([{"question": "a", "answer": "b"}]), Preparer(tokenizer(), None))


def test_used_rows_and_tokens_are_counted() -> None:
    """At max_length 4 the second row loses its completion: (0, 1) drops the row, (1, 1) keeps it."""
    rows = Dataset.from_list([{"prompt": "ab", "completion": "c"}, {"prompt": "abcdef", "completion": "g"}])
    prepared_rows = prepare(rows, Preparer(tokenizer(), max_length=4))  # "abc<end>", and "abcd" of "abcdefg<end>"
    good, used = select(prepared_rows, weights_by_segment(0, 1))
    assert (len(good), used.rows, used.rows_used, used.rows_without_weight) == (1, 2, 1, 1)
    assert (used.tokens, used.tokens_dropped, used.tokens_truncated) == (4, 4, 4)
    assert used.weighted == {"completion": 2}
    good, used = select(prepared_rows, weights_by_segment(1, 1))
    assert (len(good), used.tokens, used.weighted) == (2, 8, {"prompt": 1 + 3, "completion": 2})


def test_a_row_whose_weights_are_all_zero_is_left_out() -> None:
    rows = Dataset.from_list(
        [{"input_ids": [5, 6], "loss_weights": [1.0, 0.0]}, {"input_ids": [5, 6], "loss_weights": [0.0, 0.5]}]
    )
    good, used = select(prepare(rows, Preparer(tokenizer(), None)), weights_by_segment(0, 1))
    assert (good["row"][:], used.weighted) == ([2], {"given": 1})


def test_one_preparation_serves_all_weights() -> None:
    """The prepared rows do not depend on the weights."""
    rows = Dataset.from_list([{"prompt": "ab", "completion": "c"}])
    prepared_rows = prepare(rows, Preparer(tokenizer(), None))
    first, second = (select(prepared_rows, weights_by_segment(*weights))[0][0] for weights in ((0, 1), (1, 0)))
    assert first["segments"] == second["segments"]


def test_packing_fills_rows_and_splits_none() -> None:
    """Best fit decreasing by hand: lengths 4, 3, 2, 1 into rows of 5 are 4 + 1 and 3 + 2."""
    rows = [{"input_ids": [n] * n, "loss_weights": [0.5 * n] * n} for n in (1, 2, 3, 4)]
    packs = pack(prepare(Dataset.from_list(rows), Preparer(tokenizer(), None)), 5)
    assert packs["input_ids"][:] == [[4, 4, 4, 4, 1], [3, 3, 3, 2, 2]]
    assert packs["seq_lengths"][:] == [[4, 1], [3, 2]]
    assert packs["factors"][:] == [[2.0, 2.0, 2.0, 2.0, 0.5], [1.5, 1.5, 1.5, 1.0, 1.0]]
    assert packs["row"][:] == [[4, 4, 4, 4, 1], [3, 3, 3, 2, 2]]
