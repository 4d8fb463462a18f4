"""Chat templates, those that TRL ships and changed ones: every word of every message is written, with the segment of
its role, or reported as left out.

Words are unique, so that what a template writes shows by a search in its output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from stages.data.chat_rendering import Rendered, render_chat, target_turns
from stages.data.files import BadRow
from stages.data.segments import Segment
from tests.stages.data.test_tokenization import CHATML, FORGETFUL, tokenizer

TEMPLATES = {path.stem: path.read_text() for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
FOR_PICTURES = ("idefics3", "llava_next", "smolvlm")
"""They write a content that is text letter by letter, or refuse it."""
CONTENT = re.compile(r"(?<![\w.])(?:message|m)(?:\['content'\]|\[\"content\"\]|\.content)(?![\w.(])")
CHANGES = {
    "as it is": "{}",
    "trimmed": "({} | trim)",
    "cut": "({})[:7]",
    "without its start": "({})[9:]",
    "as JSON": "({} | tojson)",
    "left out": "''",
    "in capitals": "({} | upper)",
    "twice": "({0} ~ '/' ~ {0})",
    "without reasoning": "({}).split('</think>')[-1]",
}
WORD = re.compile(r"w\d+x")


def changed(template: str, change: str) -> str:
    """The template with its first use of a message's content changed."""
    return CONTENT.sub(lambda match: CHANGES[change].format(match.group()), template, count=1)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Turns of user and assistant, with a system message, reasoning and tool calls in some."""
    counter = iter(range(1000))

    def words() -> str:
        pieces = [f"w{next(counter)}x" for _ in range(draw(st.integers(1, 4)))]
        separators = draw(st.lists(st.sampled_from([" ", "\n", ", ", ' "', "\n\n", "} {"]), min_size=4, max_size=4))
        return draw(st.sampled_from(["", " ", "\n"])) + "".join(map("".join, zip(pieces, separators, strict=False)))

    messages = [{"role": "system", "content": words()}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer: dict[str, Any] = {"role": "assistant", "content": words()}
        match draw(st.sampled_from(["plain", "plain", "in content", "in a key", "tool"])):
            case "in content":
                answer["content"] = f"<think>\n{words().strip()}\n</think>\n\n{answer['content']}"
            case "in a key":
                answer["reasoning_content"] = words()
            case "tool":
                arguments = {f"w{next(counter)}x": words().strip(), "count": draw(st.integers(100, 999))}
                call = {"type": "function", "function": {"name": f"w{next(counter)}x", "arguments": arguments}}
                messages += [
                    {"role": "user", "content": words()},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "name": call["function"]["name"], "content": words()},
                ]
                messages.append(answer)
                continue
        messages += [{"role": "user", "content": words()}, answer]
    return messages


def words_of(message: dict[str, Any]) -> set[str]:
    """All words of a message that a template should write."""
    return set(WORD.findall(json.dumps({key: value for key, value in message.items() if key != "name"})))


def is_complete(message: dict[str, Any], output: str) -> bool:
    """Whether all texts of a message are in the output, whatever the white space, as text or as JSON."""
    values = [value for key, value in message.items() if key not in ("role", "name") and isinstance(value, str)]
    forms = [(value, json.dumps(value.strip())[1:-1]) for value in values]
    squeezed = "".join(output.split())
    return words_of(message) <= set(WORD.findall(output)) and all(
        any("".join(form.split()) in squeezed for form in pair) for pair in forms
    )


def check(template: str, messages: list[dict[str, Any]], which: str) -> Rendered | None:
    """Compare render_chat's account with the template's own output; None if the row is refused."""
    fast = tokenizer(template)
    fast.bos_token, fast.unk_token = "<bos>", "<unk>"
    targets = target_turns(messages, which)
    try:
        output = fast.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        output = None  # the template itself refuses them
    try:
        rendered = render_chat(fast, messages, targets)
    except BadRow as error:
        number, rendered = re.search(r"leaves out .* of message (\d+)", str(error)), None
    if rendered is None:
        assert number is None or (output is not None and not is_complete(messages[int(number[1]) - 1], output))
        return None
    assert output is not None
    written = set(WORD.findall(output))
    for index, message in enumerate(messages):
        own = words_of(message)
        reported = rendered.unwritten.get(index, "")
        partly = {word for word in own for part in reported.split() if word.endswith(part.strip(',"}{'))}
        assert own - written <= set(WORD.findall(reported)) | partly, (index, reported)
        assert set(WORD.findall(reported)) <= own, (index, reported)
        expected = Segment.SYSTEM if message["role"] == "system" else Segment.PROMPT
        for word in own & written:
            segments = rendered.segments[rendered.text.index(word) :][: len(word)].tolist()
            assert segments == [Segment.COMPLETION if index in targets else expected] * len(word), (index, word)
    return rendered


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_that_trl_ships(name: str, which: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "w1x w2x"},
        {"role": "assistant", "content": "<think>\nw3x w4x\n</think>\n\nw5x w6x"},
        {"role": "user", "content": "w7x\nw8x"},
        {"role": "assistant", "content": 'w9x "w10x"'},
    ]
    rendered = check(TEMPLATES[name], messages, which)
    assert rendered is not None or name.removesuffix("_training") in FOR_PICTURES
    if rendered is not None:
        assert {"w1x", "w2x", "w5x", "w6x", "w7x", "w8x", "w9x", "w10x"} <= set(WORD.findall(rendered.text))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["", "", *sorted(TEMPLATES)]),
    st.sampled_from([CHATML, FORGETFUL]),
    st.sampled_from(sorted(CHANGES)),
    conversations(),
    st.sampled_from(["all", "last"]),
)
def test_every_word_is_accounted_for(
    name: str, own: str, change: str, messages: list[dict[str, Any]], which: str
) -> None:
    check(changed(TEMPLATES.get(name, own), change), messages, which)


def segments_of(messages: Sequence[dict[str, Any]], template: str, which: str = "last") -> dict[str, str]:
    """Word -> the segment of its first character."""
    rendered = render_chat(tokenizer(template), messages, target_turns(messages, which))
    return {word: Segment(rendered.segments[rendered.text.index(word)]).name for word in WORD.findall(rendered.text)}


def test_an_earlier_answer_that_the_template_shortens_is_prompt() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "w1x"},
        {"role": "assistant", "content": "<think>w2x</think>w3x"},
        {"role": "user", "content": "w4x"},
        {"role": "assistant", "content": "<think>w5x</think>w6x"},
    ]
    expected = {"w1x": "PROMPT", "w3x": "PROMPT", "w4x": "PROMPT", "w5x": "COMPLETION", "w6x": "COMPLETION"}
    assert segments_of(messages, FORGETFUL) == expected


def test_an_earlier_answer_that_only_calls_a_tool_is_prompt() -> None:
    call = {"type": "function", "function": {"name": "w2x", "arguments": {"w3x": "w4x"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "w1x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "w5x"},
        {"role": "assistant", "content": "w6x"},
    ]
    rendered = render_chat(tokenizer(TEMPLATES["qwen3"]), messages, [3])
    prompts = [rendered.text[i] for i, segment in enumerate(rendered.segments) if segment == Segment.PROMPT]
    written = '<tool_call>\n{"name": "w2x", "arguments": {"w3x": "w4x"}}\n</tool_call>'
    assert "".join(prompts) == f"w1x{written}w5x"


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        ({"role": "assistant", "content": "w1x", "reasoning_content": "w2x"}, r"text of message 2 .*'w2x'"),
        ({"role": "assistant", "content": "w1x", "thinking": "w2x"}, r"text of message 2 .*'w2x'"),
        (
            {
                "role": "assistant",
                "content": "w1x",
                "tool_calls": [{"function": {"name": "w2x", "arguments": '{"w3x": 417}'}}],
            },
            r"tool calls of message 2 .*\['w2x', 'w3x', '417'\]",
        ),
    ],
)
def test_what_the_last_answer_loses_is_an_error(message: dict[str, Any], missing: str) -> None:
    with pytest.raises(BadRow, match=f"leaves out {missing}"):
        render_chat(tokenizer(CHATML), [{"role": "user", "content": "w0x"}, message], [1])


def test_tool_calls_of_which_a_part_is_left_out() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message.content }}{% for c in message.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}",
    )
    call = {"function": {"name": "w1x", "arguments": {"a": 417, "b": "w2x"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "w0x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    with pytest.raises(BadRow, match=r"tool calls of message 2 \(assistant\): \['b', 'w2x'\]"):
        render_chat(tokenizer(template), messages, [1])
