"""Chat templates render as transformers renders them, and a hostile one is soon refused in one sentence."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.template_limits import TEMPLATE_BYTES
from edgetune.runtime.templates import ChatTemplate

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

# Short equivalents of well-known templates.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set text = m['content'] %}
{%- if loop.index0 == 0 and system %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=0) %}
{%- for m in messages[::-1] %}{% set ns.seen = ns.seen + (1 if m.role == 'user' else 0) %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') if m.content is string else '' %}
    {%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}{% else %}{{ content }}{% endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{#- a comment -#}
{%- if ns.seen > 99 %}{{ strftime_now('%d %b %Y') }}{% endif %}"""
TOOLS = """{% macro show(value) %}{{ value | tojson(indent=2) }}{% endmacro %}
{% for m in messages if m.role in ['user', 'assistant'] %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ m.role.upper() | replace('U', 'u') }}: {{ '%s|%d' | format(m.content, 7) }}
{{ show({'a': [1, 2.5, none, true], 'é': m.content}) }}{{ "{}-{x}".format(1, x=2) }}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}{{ range(3) | list }}
{{ messages | map(attribute='role') | unique | sort | list | tojson }}{{ 7 // 2 * 2 ** 3 % 5 }}{{ undefined_thing }}"""
FAMILIES = {"llama2": LLAMA2, "llama3": LLAMA3, "zephyr": ZEPHYR, "chatml": CHATML, "tools": TOOLS}

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": '  a < b & "c"\n\n'}, {"role": "assistant", "content": "<think>x</think>\nyes "}],
    [
        {"role": "system", "content": "Be kind. 日本語 😀"},
        {"role": "user", "content": "One\r\ntwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "{{ 7*7 }} {% raw %}", "name": None},
    ],
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "two", "four"])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(family: str, chat: list[dict[str, str]], prompt: bool) -> None:
    ours = ChatTemplate(FAMILIES[family], "tokenizer_config.json", TOKENS).render(chat, prompt)
    plain = [{key: value for key, value in message.items() if value is not None} for message in chat]
    theirs, _ = chat_template_utils.render_jinja_template(
        [plain], chat_template=FAMILIES[family], add_generation_prompt=prompt, **TOKENS
    )
    assert ours == theirs[0]


def test_reasoning_has_both_names_that_templates_read() -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'reasoning' in m }};{% endfor %}"
    given = [{"role": "assistant", "content": "a", key: key} for key in ("reasoning_content", "thinking", "reasoning")]
    text = ChatTemplate(source, "x").render([*given, {"role": "assistant", "content": "a", "thinking": None}])
    assert text == ("reasoning_content|reasoning_content|False;thinking|thinking|False;reasoning|reasoning|True;||False;")


def failure(source: str, content: str = "a secret of mine", role: str = "user") -> str:
    """Return the sentence a template fails with; check that it is one, names the file and reveals nothing of the chat."""
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(source, "model/tokenizer_config.json").render([{"role": role, "content": content}])
    sentence = str(caught.value)
    assert "model/tokenizer_config.json" in sentence
    assert "\n" not in sentence
    assert "secret" not in sentence
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return sentence


DOUBLE = "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = EXPR %}{% endfor %}{{ ns.s | string }}"
BIG = "{% set b = 'a' * 900000 %}"
ATTACKS = {
    "a long loop": "{% for i in range(10**9) %}{% endfor %}",
    "empty nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a filter": "{% for i in range(99999) %}{{ range(9999) | map('string') | list | length }}{% endfor %}",
    "text times a number": "{{ 'a' * 10**9 }}",
    "a number times text": "{% set x = 10**9 * 'a' %}",
    "a list times a number": "{% set x = [1] * 10**9 %}",
    "doubling by +": DOUBLE.replace("EXPR", "ns.s + ns.s"),
    "doubling by ~": DOUBLE.replace("EXPR", "ns.s ~ ns.s"),
    "doubling by replace": DOUBLE.replace("EXPR", "ns.s.replace('a', 'aaaa')"),
    "doubling by the filter": DOUBLE.replace("EXPR", "ns.s | replace('a', 'aaaa')"),
    "doubling by join": DOUBLE.replace("EXPR", "[ns.s, ns.s] | join"),
    "doubling by format": DOUBLE.replace("EXPR", "'{0}{0}'.format(ns.s)"),
    "doubling by percent": DOUBLE.replace("EXPR", "'%s%s' % (ns.s, ns.s)"),
    "doubling by capture": DOUBLE.replace(
        "{% set ns.s = EXPR %}", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"
    ),
    "lists of lists": DOUBLE.replace("EXPR", "[ns.s, ns.s]"),
    "tuples of tuples": DOUBLE.replace("EXPR", "(ns.s, ns.s)"),
    "dicts of dicts": DOUBLE.replace("EXPR", "dict(a=ns.s, b=ns.s)"),
    "namespaces of namespaces": DOUBLE.replace("EXPR", "namespace(a=ns.s, b=ns.s)"),
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "deep lists": DOUBLE.replace("EXPR", "[ns.s]"),
    "powers": "{{ 10 ** (10 ** 10) }}",
    "repeated squares": "{% set ns = namespace(s=3) %}{% for i in range(99) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
    "macros without end": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a wide %d": "{{ '%1000000000d' % 1 }}",
    "a wide %*d": "{{ '%*d' % (99999, 1) }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a nested width": "{{ '{:{}}'.format(1, 99999) }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "center": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\n' | indent(10**9, true) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "join with a long glue": BIG + "{{ range(9999) | join(b) }}",
    "replace with a long text": BIG + "{{ b | replace('a', b) }}",
    "output": "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "a quadratic search": BIG + "{{ b.rfind('b' ~ b[1:]) }}",
    "a quadratic strip": BIG + "{{ b | trim(b[1:] | replace('a', 'b') ~ 'a') }}",
    "a quadratic sum": "{{ [[1], [2]] | sum(start=[]) }}",
    "slices": BIG + "{% set c = b[1:] %}" * 3000,
    "searches in a loop": BIG + "{% for i in range(99999) %}{% if 'b' in b %}{% endif %}{% endfor %}",
    "many names for much": BIG + "{% set n = namespace() %}{% for i in range(999) %}{% set n.x = b + 'a' %}{% endfor %}",
    "filler text": "{{ lipsum(n=1000000) }}",
    "a width behind a key with brackets": "{{ '%(a(b))999999999d' % {'a(b)': 1} }}",
    "a width behind a field with a brace": "{{ '{0[}]:>999999999}'.format({'}': 1}) }}",
    "a width for format_map": "{{ '{a[}]:>999999999}'.format_map({'a': {'}': 1}}) }}",
    "a width for the filter": "{{ '%(a(b))-999999999s' | format(**{'a(b)': 1}) }}",
    "a width in other digits": "{{ '{:٩٩٩٩٩٩٩٩٩}'.format(1) }}",
    "a wide precision": "{{ '{:.999999999f}'.format(1.0) }}",
    "a constant to compute while compiling": "{{ ('a' ~ 'b') * 10**9 }}{% set x = ['a' * 100000] * 100000 %}",
    "a long chain": "{{ " + "a ~ " * 15000 + "a }}",
    "a deep chain": "{{ a" + ".b" * 30000 + " }}",
    "many parts": "{{a}}" * 13000,
    "variables times blocks": "".join(f"{{% set a{i} = 1 %}}{{% block b{i} scoped %}}{{% endblock %}}" for i in range(900)),
    "variables times includes": "".join(f"{{% set a{i} = 1 %}}{{% include x %}}" for i in range(1300)),
    "a loop in itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 30000,
    "deep ifs": "{% if a %}" * 6000,
    "a long file": "a" * (TEMPLATE_BYTES + 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_machine_costs_a_moment(attack: str) -> None:
    # Only this thread's time counts, so that a busy machine does not fail the test.
    begun = time.thread_time()
    failure(ATTACKS[attack])
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(messages) }}",
        "{{ messages[0].update({'content': ''}) }}",
        "{{ (1).to_bytes(9, 'big') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_a_template_cannot_reach_python(escape: str) -> None:
    failure(escape)


def test_recursion_is_refused_as_nesting() -> None:
    for attack in ("macros without end", "a loop in itself", "a deep chain", "deep brackets"):
        assert "nested too deeply" in failure(ATTACKS[attack])


def test_nothing_is_computed_while_compiling() -> None:
    # Each constant is larger than the memory; the meter refuses it when the template is rendered, and not before.
    for constant in ("('a' ~ 'b') * 10**13", "'%99d' % 1 * 10**12", "['a'] * 10**12", "'a' in 'b' * 10**13"):
        template = ChatTemplate(f"{{% if messages | length > 1 %}}{{{{ {constant} }}}}{{% endif %}}fine", "x")
        assert template.render([{"role": "user", "content": "a"}]) == "fine"


def test_formats_within_the_limits_are_written_as_python_writes_them() -> None:
    source = (
        "{{ '%-5s|%5.2f|%(a)s' | replace('(a)', '') | format('ab', 1.5, 7) }} "
        "{{ '{:>6}|{a[b]:03d}|{{}}'.format('é', a={'b': 7}) }}"
    )
    assert ChatTemplate(source, "x").render([]) == "ab   | 1.50|7      é|007|{}"


def test_limits_hold_off_the_main_thread() -> None:
    sentences: list[str] = []
    attack = ATTACKS["empty nested loops"]
    thread = threading.Thread(target=lambda: sentences.append(failure(attack)))
    thread.start()
    thread.join(10)
    assert sentences
    assert "0.5 s" in sentences[0]


def test_two_renderings_do_not_share_a_budget() -> None:
    template = ChatTemplate("{% for i in range(20000) %}{% endfor %}{{ messages[0].content }}", "x")
    assert [template.render([{"role": "user", "content": "a"}]) for _ in range(20)] == ["a"] * 20


def test_a_template_may_say_why_it_refuses() -> None:
    assert "'Only users, please'" in failure("{{ raise_exception('Only users, please') }}")


def test_a_refusal_that_repeats_a_message_is_not_shown() -> None:
    failure("{{ raise_exception('I was told ' + messages[0]['content']) }}")
    failure("{{ messages[0][messages[0]['content']].x }}")
    failure("{{ messages[0]['content'] | int / 0 }}")


def test_a_failure_names_its_line() -> None:
    assert "line 3" in failure("a\nb\n{{ messages.nothing.at_all }}")


def test_a_syntax_error_is_found_on_loading() -> None:
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not valid Jinja .*line 2"):
        ChatTemplate("ok\n{% for %}", "chat_template.jinja")


def test_a_long_conversation_is_no_attack() -> None:
    gc.collect()  # else the garbage of the tests before is collected within the rendering's half second, and takes as long
    chat = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"{n} " + "word " * 400} for n in range(400)]
    text = ChatTemplate(CHATML, "x").render(chat)
    assert text.count("<|im_end|>") == 401
