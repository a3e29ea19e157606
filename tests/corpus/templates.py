"""Chat templates: broken ones, ones that attack the machine, and odd ones that transformers renders too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.case import CASES, Case, Outcome, Place, change_json, of_kind

KIND = "chat templates"
case = of_kind(KIND)
SECRET = "my private question"


def with_template(place: Place, source: str | bytes) -> Path:
    """Write the tiny LLaMA with a chat_template.jinja."""
    model = place.model()
    (model / "chat_template.jinja").write_bytes(source if isinstance(source, bytes) else source.encode())
    return model


def asked(place: Place, model: Path) -> Outcome:
    """Run `ask` on a model."""
    return place.run("ask", "--model", model, "--adapter", "none", "--max-tokens", "2", "--json", SECRET)


# Name, the template, and what the refusal names.
REFUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("a loop without an end", "{% for m in messages %}{{ m.content }}", ("Jinja",)),
    ("a filter that does not exist", "{{ messages | frobnicate }}", ("Jinja",)),
    ("a loop of a thousand million", "{% for i in range(10**9) %}x{% endfor %}", ("chat template",)),
    (
        "three loops in each other",
        "{% for i in range(9000) %}{% for j in range(9000) %}{% for k in range(9000) %}{% endfor %}{% endfor %}{% endfor %}",
        ("chat template",),
    ),
    ("a macro that calls itself for ever", "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", ("chat template",)),
    ("a text times a thousand million", "{{ 'a' * 10**9 }}", ("chat template",)),
    ("a list times a thousand million", "{{ ([0] * 10**9) | length }}", ("chat template",)),
    ("a power of a power", "{{ 9 ** (9 ** 9) }}", ("chat template",)),
    (
        "a text that doubles forty times",
        "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        ("chat template",),
    ),
    (
        "replacements of nothing by much",
        "{{ 'x' | replace('', 'x' * 9999) | replace('', 'x' * 9999) | replace('', 'x' * 9999) }}",
        ("chat template",),
    ),
    ("a width of a thousand million in %", "{{ '%0999999999d' % 1 }}", ("chat template",)),
    ("a width that is an argument of %", "{{ '%*d' % (999999999, 1) }}", ("chat template",)),
    ("a width of a thousand million in format", "{{ '{:>999999999}'.format('a') }}", ("chat template",)),
    ("a width from an argument of format", "{{ '{:{}}'.format('a', 999999999) }}", ("chat template",)),
    ("center with a width of a thousand million", "{{ 'a' | center(10**9) }}", ("chat template",)),
    ("indent with a width of a thousand million", "{{ 'a\nb' | indent(10**9) }}", ("chat template",)),
    ("ljust with a width of a thousand million", "{{ 'a'.ljust(10**9) }}", ("chat template",)),
    ("zfill with a width of a thousand million", "{{ 'a'.zfill(10**9) }}", ("chat template",)),
    ("expandtabs with a thousand million", "{{ '\t'.expandtabs(10**9) }}", ("chat template",)),
    ("Python's classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", ("chat template",)),
    ("Python's classes through format", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", ("chat template",)),
    ("a file of the system", "{% include '/etc/passwd' %}", ("chat template",)),
    ("another template", "{% extends 'base.jinja' %}", ("chat template",)),
    ("a message that is not there", "{{ messages[5].content.strip() }}", ("chat template",)),
    ("its own refusal", "{{ raise_exception('Roles must alternate') }}", ("Roles must alternate",)),
    ("ten thousand brackets", "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", ("Jinja|chat template",)),
    ("two thousand ifs in each other", "{% if 1 %}" * 2000 + "{% endif %}" * 2000, ("Jinja|chat template",)),
    ("more than 64 KiB", "{# " + "x" * 70_000 + " #}", ("KiB",)),
)

# Name, the template, and the text that it gives for one question.
RENDERED: tuple[tuple[str, str, str], ...] = (
    ("loop controls", "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
    ("transformers' generation tag", "{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
    ("JSON of the tools", "{{ tools | tojson }}{{ messages[0].role | tojson }}", 'null"user"'),
    ("white space of blocks", "{% if true %}\n  {%- set a = 1 %}\n{{ a }}\n{% endif %}", "1\n"),
    ("a name that is not defined", "{% if enable_thinking is defined %}no{% else %}yes{% endif %}", "yes"),
)  # fmt: skip


def _refusing(source: str, words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: asked(place, with_template(place, source)).refused(*words)


def _rendering(source: str, text: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        assert place.tokenizer(with_template(place, source)).render_chat([{"role": "user", "content": "hm"}]) == text

    return check


CASES.extend(Case(KIND, name, _refusing(source, words)) for name, source, words in REFUSED)
CASES.extend(Case(KIND, name, _rendering(source, text)) for name, source, text in RENDERED)


@case("a program that it starts")
def _(place: Place) -> None:
    reached = place.folder / "reached"
    source = "{{ cycler.__init__.__globals__.os.system('touch " + str(reached) + "') }}"
    asked(place, with_template(place, source)).refused("chat template")
    assert not reached.exists()


@case("a refusal that quotes the question")
def _(place: Place) -> None:
    outcome = asked(place, with_template(place, "{{ raise_exception('No: ' ~ messages[0].content) }}"))
    outcome.refused("chat template")
    assert SECRET not in outcome.err


@case("today's date, as Llama 3.2 writes it")
def _(place: Place) -> None:
    model = with_template(place, "{{ strftime_now('%Y') }}{{ messages[0].content }}")
    text = place.tokenizer(model).render_chat([{"role": "user", "content": "hm"}])
    assert text[:4].isdigit()
    assert text[4:] == "hm"


def with_named(place: Place, value: Any) -> Path:
    """Write the tiny LLaMA with a value for chat_template in tokenizer_config.json."""
    model = place.model()
    change_json(model / "tokenizer_config.json", {"chat_template": value})
    return model


@case("several templates, one of them the default")
def _(place: Place) -> None:
    model = with_named(place, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert place.tokenizer(model).render_chat([{"role": "user", "content": "hm"}]) == "d"


@case("several templates, none of them the default")
def _(place: Place) -> None:
    model = with_named(place, [{"name": "tool_use", "template": "t"}, {"name": "rag", "template": "d"}])
    asked(place, model).refused("no chat template")


@case("an object for the template")
def _(place: Place) -> None:
    asked(place, with_named(place, {"default": 5})).refused("chat.template")
