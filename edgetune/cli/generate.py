"""Implements `edgetune generate`, which continues a text, and `edgetune ask`, which answers a question."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import click

from edgetune.cli.options import GenerateOptions, generate_options, json_option, print_json
from edgetune.reports.text import sanitize
from edgetune.runtime.errors import UsageError


@click.command("generate")
@click.argument("prompt")
@generate_options
@json_option
def generate_command(options: GenerateOptions, prompt: str, as_json: bool) -> None:
    """Continue the text PROMPT. Type - to read it from standard input."""
    text = read_prompt(prompt)
    session = options.session()
    if not as_json:
        click.echo(sanitize(text), nl=False)
        show(session.stream(text, *options.sampling))
        return
    answer = session.generate(text, *options.sampling)
    print_json({
        "text": answer.text, "prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens,
        "tokens_per_second": answer.tokens_per_second, "model": session.model_name, "adapter": session.adapter_name,
    })  # fmt: skip


@click.command("ask")
@click.argument("question")
@generate_options
@json_option
def ask_command(options: GenerateOptions, question: str, as_json: bool) -> None:
    """Answer QUESTION, in the model's own chat format. Type - to read it from standard input."""
    text = read_prompt(question)
    session = options.session()
    start = time.perf_counter()
    pieces = session.chat([{"role": "user", "content": text}], *options.sampling)
    if not as_json:
        show(pieces)
        return
    answer = {"text": "".join(pieces), "model": session.model_name, "adapter": session.adapter_name}
    print_json({**answer, "seconds": time.perf_counter() - start})


def read_prompt(prompt: str) -> str:
    """Return the prompt; for "-", all of standard input. Raises UsageError if that is empty."""
    if prompt != "-":
        return prompt
    text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if not text:
        raise UsageError("Standard input was empty; expected a text. Type for example: echo 'Once' | edgetune generate -")
    return text


def show(pieces: Iterator[str]) -> None:
    """Print pieces of text as they come, sanitized, so that none can move the terminal's cursor."""
    for piece in pieces:
        click.echo(sanitize(piece), nl=False)
        sys.stdout.flush()
    click.echo()
