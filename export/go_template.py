"""Convert a model's Jinja chat template into the Go template that Ollama needs, and prove that both give the same text.

Chat templates write a message's text between two fixed stretches of their own. Rendering a conversation whose messages are
markers shows those stretches, and they become a Go template of one of a few forms. That is then run by the small evaluator
below (of the language documented in Go's text/template), and must give the same text as Jinja for other conversations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgetune.runtime.errors import TokenizerError

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]
"""Render a conversation that ends with the user's turn into the text that the model continues."""


@dataclass(frozen=True)
class Derived:
    """A Go template.

    source: its text. between: what it writes between an answer and the next question. takes_system: it writes the system
    message; otherwise it ignores it.
    """

    source: str
    between: str
    takes_system: bool


def derive(render: Render, bos: str) -> Derived | None:
    """Derive a Go template from a Jinja one; return None if no known form fits or the two give different texts.

    bos: the text that Ollama itself puts before everything, so that the template must not write it; "" for none.
    """

    def text(messages: Messages) -> str:
        return render(messages).removeprefix(bos)

    try:
        found = _derived(text)
    except TokenizerError:
        return None
    if found is None or not all(_agrees(found, text, conversation) for conversation in _trials(found.takes_system)):
        return None
    return found


# --- derivation: from Jinja to Go --------------------------------------------------------------------------------------

_SYSTEM, _QUESTIONS, _ANSWERS = "sYsTeM0mark", ("qUeStIoN1mark", "qUeStIoN2mark"), ("aNsWeR1mark",)


def _turns(questions: Sequence[str], answers: Sequence[str], system: str | None) -> list[dict[str, str]]:
    """Return system, question, answer, question … as messages, with one question more than answers."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for n, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer} for answer in answers[n : n + 1]]
    return messages


def _derived(text: Render) -> Derived | None:
    """Render conversations of markers and build the Go template from the stretches around them; None if no form fits."""
    plain = _cut(text(_turns(_QUESTIONS, _ANSWERS, None)), (_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1]))
    if plain is None:
        return None
    start, asked, between, end = plain
    # The text after a question begins alike before a given answer and before the one to be generated: that much closes the
    # question, and only the rest begins the answer.
    after = _common(asked, end)
    question = f"{{{{ .Content }}}}{_literal(after)}"
    opening = _literal(start)
    takes_system = True
    try:
        whole = text(_turns(_QUESTIONS, _ANSWERS, _SYSTEM))
    except TokenizerError:
        whole = ""
    first = _cut(whole, (_SYSTEM, _QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1]))
    last = _cut(whole, (_QUESTIONS[0], _ANSWERS[0], _SYSTEM, _QUESTIONS[1]))
    if first is not None and first[2:] == (asked, between, end):  # the system message comes before the first question
        opening = (
            f"{{{{ if .System }}}}{_literal(first[0])}{{{{ .System }}}}{_literal(first[1])}{{{{ else }}}}{opening}{{{{ end }}}}"
        )
    elif last is not None and (last[0], last[1], last[4]) == (start, asked, end) and last[2].startswith(between):
        before = last[2].removeprefix(between)  # the system message comes before the last question
        system = f"{_literal(before)}{{{{ $.System }}}}{_literal(last[3])}"
        question = f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{system}{{{{ end }}}}{question}"
    else:
        takes_system = False
    answer = f"{_literal(asked[len(after) :])}{{{{ .Content }}}}{_literal(between)}"
    source = (
        f'{opening}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{question}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{_literal(end[len(after) :])}'
    )
    return Derived(source, between, takes_system)


def _cut(text: str, marks: Sequence[str]) -> tuple[str, ...] | None:
    """Return the text before, between and after `marks`; None unless each occurs exactly once and in this order."""
    stretches = []
    for mark in marks:
        stretch, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        stretches.append(stretch)
    stretches.append(text)
    every_mark = (_SYSTEM, *_QUESTIONS, *_ANSWERS)
    return None if any(mark in stretch for stretch in stretches for mark in every_mark) else tuple(stretches)


def _common(a: str, b: str) -> str:
    """Return the longest common prefix."""
    length = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _literal(text: str) -> str:
    """Escape text for a Go template, where two braces begin an action."""
    return text.replace("{{", '{{ "{{" }}')


# --- proof: evaluate the Go template -----------------------------------------------------------------------------------


def _trials(takes_system: bool) -> list[list[dict[str, str]]]:
    """Return conversations of one to three questions, with and without a system message if the template takes one."""
    questions = ["How far is the moon?", "And the sun, at noon:\n- in km\n- in miles", "Why (roughly)?"]
    answers = ["384,400 km.", "About 150 million km;\n\n93 million miles."]
    systems = [None, "You are brief."] if takes_system else [None]
    return [_turns(questions[: n + 1], answers[:n], system) for n in range(3) for system in systems]


def _agrees(derived: Derived, text: Render, messages: Messages) -> bool:
    """Return True if the Go template gives the same text as the Jinja one."""
    try:
        return evaluate(derived.source, messages) == text(messages)
    except (TokenizerError, ValueError):  # for example a single brace before a text, which makes another action of it
        return False


_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_LAST = "and $.System (eq (len (slice $.Messages $i)) 1)"
"""Condition under which a system message is written before the last question."""


def evaluate(source: str, messages: Messages) -> str:
    """Evaluate a Go template that `derive` wrote as Ollama does; return its text.

    `.Messages` are all messages, `.System` is the text of the system messages. Raises ValueError for any other action.
    """
    tokens = _ACTION.split(source)  # text, action, text, …
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    out, at = _run(tokens, 0, {"system": system, "messages": list(messages)}, True)
    if at != len(tokens):
        raise ValueError("the template has one end too many")
    return out


def _run(tokens: list[str], at: int, scope: dict[str, object], live: bool) -> tuple[str, int]:
    """Evaluate from tokens[at], a text, up to the `else` or `end` of this block; return the text and that token's index.

    live: False only skips a branch that is not taken: it is parsed, and writes nothing that is used.
    """
    out = ""
    while at < len(tokens):
        out += tokens[at]
        if at + 1 == len(tokens):
            return out, len(tokens)
        action = tokens[at + 1].strip()
        if action.startswith(("else", "end")):
            return out, at + 1
        if action.startswith("if "):
            piece, at = _choose(tokens, at + 1, action.removeprefix("if "), scope, live)
        elif action == "range $i, $_ := .Messages":
            piece, at = _repeat(tokens, at + 2, scope, live)
        else:
            piece, at = _value(action, scope, live), at + 2
        out += piece
    return out, at


def _choose(tokens: list[str], at: int, condition: str, scope: dict[str, object], live: bool) -> tuple[str, int]:
    """Evaluate the `if` whose action is tokens[at], with its branches; return the text and the index after its `end`."""
    taken = live and _holds(condition, scope)
    piece, at = _run(tokens, at + 1, scope, taken)
    chosen = piece if taken else ""
    action = tokens[at].strip() if at < len(tokens) else ""
    if action == "end":
        return chosen, at + 1
    if action.startswith("else if "):
        other, at = _choose(tokens, at, action.removeprefix("else if "), scope, live and not taken)
    elif action == "else":
        other, at = _run(tokens, at + 1, scope, live and not taken)
        at += 1
    else:
        raise ValueError("the template has no end for an if")
    return (chosen if taken else other if live else ""), at


def _repeat(tokens: list[str], start: int, scope: dict[str, object], live: bool) -> tuple[str, int]:
    """Evaluate a `range` over the messages, its body from tokens[start]; return the text and the index after its `end`."""
    messages = scope["messages"]
    assert isinstance(messages, list)
    out = ""
    for number, message in enumerate(messages):
        out += _run(tokens, start, {**scope, "message": message, "left": len(messages) - number}, live)[0]
    at = _run(tokens, start, {**scope, "message": {}, "left": 0}, False)[1]  # finds the end even without any message
    if at >= len(tokens) or tokens[at].strip() != "end":
        raise ValueError("the template has no end for a range")
    return out, at + 1


def _holds(condition: str, scope: dict[str, object]) -> bool:
    """Evaluate the condition of an `if`."""
    if condition == ".System":
        return bool(scope["system"])
    if condition == _LAST:
        return bool(scope["system"]) and scope["left"] == 1
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    if role is None:
        raise ValueError(f"edgetune writes no condition {condition!r}")
    message = scope["message"]
    assert isinstance(message, Mapping)
    return bool(message.get("role") == role[1])


def _value(action: str, scope: dict[str, object], live: bool) -> str:
    """Return the text that an action writes."""
    if action in (".System", "$.System"):
        return str(scope["system"])
    if action == ".Content":
        message = scope["message"]
        assert isinstance(message, Mapping)
        return str(message.get("content", "")) if live else ""
    if action == '"{{"':
        return "{{"
    raise ValueError(f"edgetune writes no action {action!r}")
