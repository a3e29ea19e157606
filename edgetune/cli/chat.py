"""Implements `edgetune chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from edgetune.cli.generate import show
from edgetune.cli.options import GenerateOptions, generate_options, json_option, print_json, say
from edgetune.reports.text import sanitize

if TYPE_CHECKING:
    from edgetune.chat import Chat

HELP = "/compare QUESTION answers with and without the adapter; /reset forgets the conversation; /quit ends the chat."


@click.command("chat")
@generate_options
@json_option
def chat_command(options: GenerateOptions, as_json: bool) -> None:
    """Talk with the model, one line at a time. /help lists the commands you can type.

    With --json each answer is an object: {"user", "assistant"}, or {"user", "base", "adapter"} for /compare.
    """
    from edgetune.chat import Chat

    chat = Chat(options.session(), *options.sampling)
    if sys.stdin.isatty():
        say(HELP)
    while (text := _next_line()) is not None:
        if text == "/quit":
            return
        if text == "/help":
            say(HELP)
        elif text == "/reset":
            chat.reset()
        elif text.startswith("/compare"):
            _compare(chat, text.removeprefix("/compare").strip(), as_json)
        elif text.startswith("/"):
            say(f"Unknown command {sanitize(text.split()[0])}. {HELP}")
        elif text and as_json:
            print_json({"user": text, "assistant": "".join(chat.say(text)).strip()})
        elif text:
            show(chat.say(text))


def _next_line() -> str | None:
    """Return the user's next line, stripped; None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _compare(chat: Chat, question: str, as_json: bool) -> None:
    if not question:
        say("Type a question after /compare.")
        return
    base, adapted = chat.compare(question)
    if as_json:
        print_json({"user": question, "base": base.strip(), "adapter": adapted.strip()})
        return
    click.echo(f"base:    {sanitize(base.strip())}\nadapter: {sanitize(adapted.strip())}")
