"""edgetune generate and edgetune ask: a text continued, a question answered."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import (
    adapter_option,
    device_option,
    json_option,
    max_tokens_option,
    model_option,
    print_json,
    say,
    seed_option,
    temperature_option,
)
from edgetune.runtime.errors import UsageError
from edgetune.ui import sanitize

if TYPE_CHECKING:
    from edgetune.session import Session


@click.command("generate")
@click.argument("prompt")
@model_option
@adapter_option
@device_option
@max_tokens_option
@temperature_option
@seed_option
@json_option
def generate_command(
    prompt: str,
    model: str | None,
    adapter: str | None,
    device: str,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Continue PROMPT; - reads it from standard input."""
    from edgetune.session import Session

    text = _read_prompt(prompt)
    session = Session.load(model, adapter, device)
    introduce(session, model)
    if as_json:
        answer = session.generate(text, max_tokens, temperature, seed)
        print_json({
            "text": answer.text, "prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens,
            "tokens_per_second": answer.tokens_per_second, "model": session.model_name, "adapter": session.adapter_name,
        })  # fmt: skip
        return
    click.echo(sanitize(text), nl=False)
    show(session.stream(text, max_tokens, temperature, seed))


@click.command("ask")
@click.argument("question")
@model_option
@adapter_option
@device_option
@max_tokens_option
@temperature_option
@seed_option
@json_option
def ask_command(
    question: str,
    model: str | None,
    adapter: str | None,
    device: str,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Answer QUESTION by the model's chat template; - reads it from standard input."""
    from edgetune.session import Session

    session = Session.load(model, adapter, device)
    introduce(session, model)
    pieces = session.chat([{"role": "user", "content": _read_prompt(question)}], max_tokens, temperature, seed)
    if not as_json:
        show(pieces)
        return
    start = time.perf_counter()
    print_json(
        {
            "text": "".join(pieces),
            "seconds": time.perf_counter() - start,
            "model": session.model_name,
            "adapter": session.adapter_name,
        }
    )


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if not text:
        raise UsageError("Standard input was empty; type e.g. echo 'Once' | edgetune generate -")
    return text


def introduce(session: Session, model: str | None) -> None:
    """The first line printed: which model and which adapter answer, and whether it is only the demo for want of another."""
    from edgetune.models import DEMO, DEMO_NOTICE

    say(f"Model {sanitize(session.model_name)}, adapter {sanitize(session.adapter_name)}.")
    if model is None and session.model_name == DEMO:
        say(DEMO_NOTICE)


def show(pieces: Iterator[str]) -> None:
    """Print pieces as they come; nothing in them can move the terminal's cursor."""
    for piece in pieces:
        click.echo(sanitize(piece), nl=False)
        sys.stdout.flush()
    click.echo()
