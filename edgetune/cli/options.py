"""Command-line options that several commands share, and functions that print and ask."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgetune.config import READING, DataConfig, GenerateConfig, TrainConfig
from edgetune.progress import Show
from edgetune.reports.terminal import renderer
from edgetune.reports.text import one_line
from edgetune.settings import Choice, Setting, Switch, Text, Texts, settings_of

if TYPE_CHECKING:
    from edgetune.library.base_models import ModelChoice
    from edgetune.session import Session

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class SettingType(click.ParamType):
    """Checks the text of a flag as its Setting says: a wrong one is the same sentence as in config.toml, and exits 2."""

    def __init__(self, declared: Setting) -> None:
        self.declared, self.name = declared, declared.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value that a text stands for. Raises SettingError."""
        return self.declared.read(value) if isinstance(value, str) else value


def setting_option(declared: Setting, default: Any = None) -> Decorator:
    """Return the flag of a setting. default: what the command receives without it; None where config.toml may say otherwise."""
    if isinstance(declared.kind, Switch):
        return click.option(declared.flag, declared.name, is_flag=True, default=None, help=declared.explained)
    metavar = f"[{'|'.join(declared.kind.words)}]" if isinstance(declared.kind, Choice) else declared.metavar
    if isinstance(declared.kind, Texts):
        kind = SettingType(dataclasses.replace(declared, kind=Text()))
        return click.option(declared.flag, declared.name, type=kind, multiple=True, metavar=metavar, help=declared.explained)
    kind = SettingType(declared)
    return click.option(declared.flag, declared.name, type=kind, default=default, metavar=metavar, help=declared.explained)


def configuration_options(owner: type) -> list[Decorator]:
    """Return the flags of all settings of a configuration that have one."""
    return [setting_option(declared) for declared in settings_of(owner) if declared.flag]


_GENERATE = {declared.name: declared for declared in settings_of(GenerateConfig)}
_TRAIN = {declared.name: declared for declared in settings_of(TrainConfig)}

model_option = setting_option(_TRAIN["model"])
me_option = setting_option(next(declared for declared in settings_of(DataConfig) if declared.name == "me"))
adapter_option: Decorator = click.option(
    "--adapter",
    metavar="A",
    help="Adapter: its name, its folder (PEFT, mlx-lm) or GGUF file; none for the bare base model. Default: the current one.",
)
device_option = setting_option(_GENERATE["device"], GenerateConfig.device)
weights_option = setting_option(_GENERATE["weights"], GenerateConfig.weights)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print only machine-readable JSON on standard output."
)


def reading_options(command: Callable[..., None]) -> Callable[..., Any]:
    """Add the settings by which notes are read, named as `train_config` expects them."""
    decorated: Callable[..., Any] = command
    for declared in reversed(list(settings_of(DataConfig))):
        if declared.name in READING:
            decorated = setting_option(declared)(decorated)
    return decorated


def memory_option(help: str) -> Decorator:
    """Return --memory for a command that is no training run."""
    return setting_option(dataclasses.replace(_TRAIN["memory"], help=help))


def minutes_option(help: str, default: float) -> Decorator:
    """Return --minutes for a command that is no training run."""
    return setting_option(dataclasses.replace(_TRAIN["minutes"], help=f"{help} Default: {default:g}."), default)


@dataclass(frozen=True)
class GenerateOptions:
    """The options that `generate`, `ask` and `chat` share: the model, the adapter, and how text is sampled."""

    model: str | None
    adapter: str | None
    device: str
    head: str
    weights: str
    max_tokens: int
    temperature: float | None
    seed: int | None

    def session(self) -> Session:
        """Open the model and the adapter, and name both on standard error."""
        from edgetune.library.loading import choose_model
        from edgetune.session import Session

        choice = choose_model(self.model)
        with progress_shown() as show:
            session = Session.load(choice.name, self.adapter, self.device, self.head, self.weights, show)
        say_model(choice, session.adapter_name)
        for notice in session.notices:
            say(one_line(notice))
        return session

    @property
    def sampling(self) -> tuple[int, float | None, int | None]:
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
        weights: str,
        max_tokens: int,
        temperature: float | None,
        seed: int | None,
        **others: Any,
    ) -> None:
        command(GenerateOptions(model, adapter, device, head, weights, max_tokens, temperature, seed), **others)

    # Without --temperature, the model's own setting comes before ours.
    defaults = {"head": GenerateConfig.head, "max_tokens": GenerateConfig.max_tokens, "temperature": None, "seed": None}
    own = [setting_option(_GENERATE[name], default) for name, default in defaults.items()]
    options = (model_option, adapter_option, device_option, weights_option, *own)
    decorated: Callable[..., Any] = parsed
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def model_words(choice: ModelChoice) -> str:
    """Return a model's name, followed by the reason for it in brackets where nobody named it."""
    return one_line(choice.name) + (f" ({choice.why})" if choice.why else "")


def say_model(choice: ModelChoice, adapter: str | None = None) -> None:
    """Say which model is used where nobody named it, and why; with an adapter, say both in any case."""
    from edgetune.library.base_models import DEMO, DEMO_NOTICE

    if adapter is not None:
        say(f"Model {model_words(choice)}, adapter {one_line(adapter)}.")
    elif choice.why:
        say(f"Model: {model_words(choice)}.")
    if choice.why and choice.name == DEMO:
        say(DEMO_NOTICE)


def print_json(value: dict[str, Any]) -> None:
    """Print one object as one line of JSON on standard output, with null for a number that JSON cannot hold."""
    click.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Print a line for the user on standard error, where it does not end up in a pipe."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress_shown() -> Iterator[Show]:
    """Yield a function that shows Working events on standard error, so that standard output holds the result alone."""
    with renderer(file=sys.stderr) as shown:
        yield shown.show


@contextlib.contextmanager
def told_to_continue() -> Iterator[None]:
    """Say on Ctrl-C that the same command continues the work."""
    try:
        yield
    except KeyboardInterrupt:
        say("Nothing is lost: run the same command again to continue.")
        raise


def confirmed(question: str, unanswered: str) -> bool:
    """Ask a question, and return True for a yes. Raises UsageError with the sentence `unanswered` where nobody can answer."""
    from edgetune.runtime.errors import UsageError

    try:
        return click.confirm(question)
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            click.echo()
            raise UsageError(unanswered) from error
        raise
