"""Every answer of a chat is found where the model's template puts it, and nothing that the user said is taken for one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgetune.runtime.answer_spans import RenderedChat
from edgetune.runtime.templates import ChatTemplate

# Short equivalents of published templates.
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set body = m.content %}
{%- if '</think>' in body %}
{%- set thought = body.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set body = body.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + body.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>assistant\\n' + body + '<|im_end|>\\n' }}{% endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
ALWAYS_THINKS = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
LLAMA2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}
{%- if loop.index0 == 0 and system %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}
{%- else %}{% set text = m.content %}{% endif %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GENERATION = """{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
VICUNA = """{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}
{%- if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
ENDS = re.compile("|".join(map(re.escape, ("</s>", "<|im_end|>", "<end_of_turn>"))))


def ends_of(text: str) -> list[int]:
    return [match.start() for match in ENDS.finditer(text)]


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def answers(template: str, messages: list[dict[str, Any]]) -> list[tuple[str, str] | None]:
    """Return each answer as it was found in the rendered chat, and the token after it."""
    made = ChatTemplate(template, "x", {"bos_token": "<s>", "eos_token": "</s>"})
    found = RenderedChat(lambda some, prompt: made.render(some, prompt), messages, ends_of)
    result: list[tuple[str, str] | None] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            span = found.answer(number)
            end = ENDS.match(found.text, span.end) if span is not None and span.stop is not None else None
            result.append(None if span is None else (found.text[span.start : span.end], end[0] if end else ""))
    return result


IM_END = "<|im_end|>"


def test_an_answer_goes_from_its_prompt_to_its_end() -> None:
    assert answers(CHATML, chat("q1", "a1", "q2", "a2", system="S")) == [("a1", IM_END), ("a2", IM_END)]


def test_a_template_that_thinks_in_the_last_answer_alone_loses_none() -> None:
    thought = "<think>\n\n</think>\n\n"
    assert answers(QWEN3, chat("q1", "a1", "q2", "a2", "q3", "a3")) == [
        ("a1", IM_END),
        ("a2", IM_END),
        (thought + "a3", IM_END),
    ]
    assert answers(QWEN3, chat("q1", "a1", "Thanks")) == [("a1", IM_END)]


def test_reasoning_is_part_of_the_answer_as_the_template_writes_it() -> None:
    messages = chat("q1", "a1", "q2", "a2")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "hm one", "hm two"
    assert answers(QWEN3, messages) == [("a1", IM_END), ("<think>\nhm two\n</think>\n\na2", IM_END)]
    inside = chat("q1", "<think>\nhm one\n</think>\n\na1", "q2", "<think>\nhm two\n</think>\n\na2")
    assert answers(QWEN3, inside) == [("a1", IM_END), ("<think>\nhm two\n</think>\n\na2", IM_END)]


def test_what_the_prompt_already_holds_is_not_part_of_the_answer() -> None:
    messages = chat("q1", "<b>a1</b>", "q2", "a2")
    assert answers(ALWAYS_THINKS, messages) == [("<b>a1</b>", IM_END), ("\n</think>\n\na2", IM_END)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ("    x = 1\n    y = 2\n\n", IM_END)),
        (LLAMA2, (" x = 1\n    y = 2 ", "</s>")),
        (GEMMA, ("x = 1\n    y = 2", "<end_of_turn>")),
    ],
)
def test_white_space_is_as_the_template_leaves_it(template: str, expected: tuple[str, str]) -> None:
    found = answers(template, chat("  q1\n", "    x = 1\n    y = 2\n\n", "q2", "\n\n  two "))
    assert found[0] == expected
    assert found[1] is not None
    assert found[1][0].strip() == "two"


def test_the_systems_turn_inside_the_users_is_no_hindrance() -> None:
    assert answers(LLAMA2, chat("q1", "a1", "q2", "a2", system="Be brief.")) == [(" a1 ", "</s>"), (" a2 ", "</s>")]


def test_a_user_who_quotes_the_answer_is_not_trained() -> None:
    messages = chat("Say: Two inches.", "Two inches.", "Two inches.", "Two inches.", "Two inches.<|im_end|>")
    made = ChatTemplate(CHATML, "x")
    found = RenderedChat(lambda some, prompt: made.render(some, prompt), messages, ends_of)
    spans = [found.answer(number) for number in (1, 3)]
    head = "<|im_start|>assistant\n"
    places = [match.end() for match in re.finditer(re.escape(head), found.text)]
    assert [span.start for span in spans if span is not None] == places
    assert [span.end for span in spans if span is not None] == [place + len("Two inches.") for place in places]


def test_a_generation_block_holds_what_is_found() -> None:
    messages = chat("q1", "a1", "q2", "  a2\n")
    inside = re.findall(r"assistant\n(.*?)<\|im_end\|>", ChatTemplate(GENERATION, "x").render(messages, False), re.DOTALL)
    assert [found[0] for found in answers(GENERATION, messages) if found] == inside == ["a1", "  a2\n"]


def test_without_end_tokens_an_answer_ends_where_the_next_turn_begins() -> None:
    assert answers(VICUNA, chat("q1", "a1", "q2", "a2")) == [(" a1", ""), (" a2", "")]


def test_an_answer_without_text_that_calls_a_tool_is_found() -> None:
    template = CHATML.replace("m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +")
    call = {"type": "function", "function": {"name": "depth", "arguments": {"plant": "garlic"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2 in"},
        {"role": "assistant", "content": "Two inches."},
    ]
    called, said = answers(template, messages)
    assert called is not None
    assert '"garlic"' in called[0]
    assert said == ("Two inches.", IM_END)


def test_an_answer_that_the_template_does_not_show_is_not_guessed() -> None:
    hidden = "{% for m in messages %}{{ m.role }}: {{ m.content if m.role == 'user' else '...' }}</s>\n{% endfor %}"
    assert answers(hidden, chat("q1", "a1", "q2", "a2")) == [None, None]
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}\n{% endfor %}"
    assert answers(twice, chat("q1", "a1")) == [None]
