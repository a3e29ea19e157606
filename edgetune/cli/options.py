"""Command-line options that several commands share, and functions that print."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgetune.config import HEADS, GenerateConfig
from edgetune.progress import Show
from edgetune.reports.terminal import renderer
from edgetune.reports.text import sanitize
from edgetune.runtime.device import DEVICES

if TYPE_CHECKING:
    from edgetune.session import Session

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "--model",
    metavar="M",
    help="Base model: a folder, a Hugging Face id in the local cache, or demo. Default: the best found here.",
)
adapter_option: Decorator = click.option(
    "--adapter",
    metavar="A",
    help="Adapter: its name, its folder (PEFT, mlx-lm) or GGUF file; none for the bare base model. Default: the current one.",
)
device_option: Decorator = click.option(
    "--device", type=click.Choice(DEVICES), default=GenerateConfig.device, show_default=True, help="Device to run on."
)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print only machine-readable JSON on standard output."
)
max_tokens_option: Decorator = click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=GenerateConfig.max_tokens,
    show_default=True,
    metavar="N",
    help="Maximum number of tokens to write.",
)
temperature_option: Decorator = click.option(
    "--temperature",
    type=click.FloatRange(0.0, 10.0),
    default=GenerateConfig.temperature,
    show_default=True,
    metavar="X",
    help="Randomness in choosing words; 0 always takes the likeliest word.",
)
seed_option: Decorator = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="S",
    help="Seed of that randomness: the same seed gives the same words.",
)
head_option: Decorator = click.option(
    "--head",
    type=click.Choice(HEADS),
    default=GenerateConfig.head,
    show_default=True,
    help="Number format of the output layer: as stored, 8 bits, or 4 bits (fastest, slightly worse). "
    "auto: int8 on a CPU with kernels.",
)


@dataclass(frozen=True)
class GenerateOptions:
    """The options that `generate`, `ask` and `chat` share: the model, the adapter, and how text is sampled."""

    model: str | None
    adapter: str | None
    device: str
    head: str
    max_tokens: int
    temperature: float
    seed: int | None

    def session(self) -> Session:
        """Open the model and the adapter, and name both on standard error."""
        from edgetune.library.base_models import DEMO, DEMO_NOTICE
        from edgetune.session import Session

        session = Session.load(self.model, self.adapter, self.device, self.head)
        say(f"Model {sanitize(session.model_name)}, adapter {sanitize(session.adapter_name)}.")
        if self.model is None and session.model_name == DEMO:
            say(DEMO_NOTICE)
        return session

    @property
    def sampling(self) -> tuple[int, float, int | None]:
        """Return max_tokens, temperature and seed: the arguments of Session's methods after the prompt."""
        return self.max_tokens, self.temperature, self.seed


def generate_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Add the options of GenerateOptions to a command, which receives them as its first argument."""

    @functools.wraps(command)
    def parsed(
        model: str | None,
        adapter: str | None,
        device: str,
        head: str,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        **others: Any,
    ) -> None:
        command(GenerateOptions(model, adapter, device, head, max_tokens, temperature, seed), **others)

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
    """Print one object as one line of JSON on standard output."""
    click.echo(json.dumps(value))


def say(text: str) -> None:
    """Print a line for the user on standard error, where it does not end up in a pipe."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress_shown() -> Iterator[Show]:
    """Yield a function that shows Working events on standard error, so that standard output holds the result alone."""
    with renderer(file=sys.stderr) as shown:
        yield shown.show
