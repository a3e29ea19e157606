"""Options that several commands share, and how they print."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgetune.config import HEADS
from edgetune.reports.text import sanitize
from edgetune.runtime.device import DEVICES

if TYPE_CHECKING:
    from edgetune.session import Session

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "--model",
    metavar="M",
    help="A folder, a Hugging Face id in the local cache, or demo. Default: the best found here.",
)
adapter_option: Decorator = click.option(
    "--adapter",
    metavar="A",
    help="An adapter's name, its folder (PEFT, mlx-lm) or GGUF file; none for the bare base. Default: the current one.",
)
device_option: Decorator = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to run."
)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print machine-readable JSON alone on standard output."
)
max_tokens_option: Decorator = click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Tokens to write at most."
)
temperature_option: Decorator = click.option(
    "--temperature",
    type=click.FloatRange(0.0, 10.0),
    default=0.7,
    show_default=True,
    metavar="X",
    help="0 takes the likeliest word.",
)
seed_option: Decorator = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="S", help="The same seed gives the same words."
)
head_option: Decorator = click.option(
    "--head",
    type=click.Choice(HEADS),
    default="auto",
    show_default=True,
    help="The head: as stored, in 8 bits, in 4 (quickest, a little worse); auto is int8 on a CPU with compiled kernels.",
)


@dataclass(frozen=True)
class Writing:
    """What `generate`, `ask` and `chat` share: who writes, and how."""

    model: str | None
    adapter: str | None
    device: str
    head: str
    max_tokens: int
    temperature: float
    seed: int | None

    def session(self) -> Session:
        """Open the model, and say on standard error which model and adapter answer."""
        from edgetune.library.base_models import DEMO, DEMO_NOTICE
        from edgetune.session import Session

        session = Session.load(self.model, self.adapter, self.device, self.head)
        say(f"Model {sanitize(session.model_name)}, adapter {sanitize(session.adapter_name)}.")
        if self.model is None and session.model_name == DEMO:
            say(DEMO_NOTICE)
        return session

    @property
    def sampling(self) -> tuple[int, float, int | None]:
        """Session's arguments after the prompt."""
        return self.max_tokens, self.temperature, self.seed


def writing_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Give a command the options of Writing, and a Writing as its first argument."""

    @functools.wraps(command)
    def parsed(
        model: str | None,
        adapter: str | None,
        device: str,
        head: str,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        **own: Any,
    ) -> None:
        command(Writing(model, adapter, device, head, max_tokens, temperature, seed), **own)

    options = (
        model_option,
        adapter_option,
        device_option,
        head_option,
        max_tokens_option,
        temperature_option,
        seed_option,
    )
    decorated: Callable[..., Any] = parsed
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def print_json(value: dict[str, Any]) -> None:
    """One object, one line, on standard output."""
    click.echo(json.dumps(value))


def say(text: str) -> None:
    """A line for the person, on standard error, where it is in nobody's pipe."""
    click.echo(text, err=True)
