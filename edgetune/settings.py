"""Declares what values a setting takes, and checks them alike from a flag, from a line of config.toml and from Python.

A field of a configuration is declared once, with its default, its Kind of value and its help:

    rank: int = setting(16, Whole(1, 1024), "Rank (size) of the adapter.", metavar="R")
"""

from __future__ import annotations

import abc
import dataclasses
import datetime
import math
import numbers
import os
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from edgetune.runtime.errors import SettingError, UsageError

_QUOTE = reprlib.Repr()
"""Shortens a value that an error names."""
_QUOTE.maxstring = _QUOTE.maxother = 60

_LONGEST_WHOLE = 20
"""Most characters of a whole number that are read: more than any setting's largest value has."""


class Kind(abc.ABC):
    """A kind of value: a whole number, one of a few words, a list of texts."""

    metavar: ClassVar[str] = "TEXT"
    """The placeholder for the value in the help of a flag."""

    @property
    @abc.abstractmethod
    def expected(self) -> str:
        """Return words for the values that are taken, as they follow "expected" in an error."""

    @abc.abstractmethod
    def checked(self, value: Any) -> Any:
        """Return a value in the form that the field holds. Raises ValueError for a value that is not taken."""

    def read(self, text: str) -> Any:
        """Return the value that the text of a flag stands for, still to be checked. Raises ValueError if it stands for none."""
        return text


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `low` to `high`."""

    low: int
    high: int
    metavar: ClassVar[str] = "N"

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def checked(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not self.low <= int(value) <= self.high:
            raise ValueError(value)
        return int(value)

    def read(self, text: str) -> int:
        if len(text) > _LONGEST_WHOLE:  # int() takes quadratic time for thousands of digits
            raise ValueError(text)
        return int(text)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`; `above` and `below` exclude these two themselves."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    metavar: ClassVar[str] = "X"

    @property
    def expected(self) -> str:
        if not (self.above or self.below):
            return f"a number from {self.low:.12g} to {self.high:.12g}"
        low, high = "above" if self.above else "of at least", "below" if self.below else "at most"
        return f"a number {low} {self.low:.12g} and {high} {self.high:.12g}"

    def checked(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(value)
        try:
            number = float(value)
        except OverflowError as error:
            raise ValueError(value) from error
        # NaN is in no range.
        if not self.low <= number <= self.high or (self.above and number == self.low) or (self.below and number == self.high):
            raise ValueError(value)
        return number

    def read(self, text: str) -> float:
        return float(text)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.words)}"

    def checked(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(value)
        return value


@dataclass(frozen=True)
class Text(Kind):
    """A text that is not empty: a name or a path."""

    @property
    def expected(self) -> str:
        return "a text that is not empty"

    def checked(self, value: Any) -> str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise ValueError(value)
        return text


@dataclass(frozen=True)
class Texts(Kind):
    """A list of texts, none of them empty. The flag is repeated, once for each."""

    @property
    def expected(self) -> str:
        return "a list of texts, none of them empty"

    def checked(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(value)
        return tuple(Text().checked(item) for item in value)


@dataclass(frozen=True)
class Names(Kind):
    """One or more of some known names, each at most once. The flag separates them by commas."""

    known: tuple[str, ...]
    metavar: ClassVar[str] = "LIST"

    @property
    def expected(self) -> str:
        return f"one or more of {', '.join(self.known)}"

    def checked(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
            raise ValueError(value)
        if unknown := [name for name in value if name not in self.known]:
            raise ValueError(unknown[0])
        return tuple(dict.fromkeys(value))

    def read(self, text: str) -> tuple[str, ...]:
        return tuple(name for part in text.split(",") if (name := part.strip()))


@dataclass(frozen=True)
class Switch(Kind):
    """True or false. The flag takes no value."""

    @property
    def expected(self) -> str:
        return "true or false"

    def checked(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value


@dataclass(frozen=True)
class Parsed(Kind):
    """A text with a form of its own, which `parse` knows: it raises UsageError for any other."""

    parse: Callable[[str], object]
    form: str

    @property
    def expected(self) -> str:
        return self.form

    def checked(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(value)
        try:
            self.parse(value)
        except UsageError as error:
            raise ValueError(value) from error
        return value


@dataclass(frozen=True)
class Setting:
    """The declaration of a field. `flag`: its flag, "" if it has none."""

    name: str
    default: Any
    kind: Kind
    help: str
    flag: str
    metavar: str
    example: Any

    def checked(self, value: Any, called: str) -> Any:
        """Return a value in the form that the field holds; `called` names the setting. Raises SettingError for others."""
        if value is None and self.default is None:
            return None
        try:
            return self.kind.checked(value)
        except ValueError as error:
            raise SettingError(f"{called} is {shown(error.args[0])}; expected {self.kind.expected}.") from error

    def read(self, text: str) -> Any:
        """Return the value that a flag's text stands for. Raises SettingError, which names the flag."""
        try:
            return self.checked(self.kind.read(text), self.flag)
        except ValueError as error:
            raise SettingError(f"{self.flag} is {shown(text)}; expected {self.kind.expected}.") from error

    @property
    def explained(self) -> str:
        """Return the help with the default, for `--help`."""
        value = self.default
        if value is None or value is False or value == ():
            return self.help
        text = ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
        before, found, after = self.help.partition("{default}")
        return f"{before}Default: {text}{after}" if found else f"{self.help} Default: {text}."


def setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    example: Any = None,
) -> Any:
    """Declare a field of a frozen dataclass.

    help: for `--help`; "{default}" stands where "Default: VALUE" is to stand if not at the end. flag: None makes it from the
    field's name, "" gives the field none. example: a value to suggest where the default is None.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "kind": kind, "help": help, "flag": flag, "metavar": metavar, "example": default if example is None else example,
        },
    )  # fmt: skip


def settings_of(owner: type) -> Iterator[Setting]:
    """Yield the declared settings of a dataclass, in their order."""
    for item in dataclasses.fields(owner):
        if "kind" in item.metadata:
            kind, flag, metavar = (item.metadata[name] for name in ("kind", "flag", "metavar"))
            flag = f"--{item.name.replace('_', '-')}" if flag is None else flag
            metavar = kind.metavar if metavar is None else metavar
            yield Setting(item.name, item.default, kind, item.metadata["help"], flag, metavar, item.metadata["example"])


def check(configuration: Any) -> None:
    """Check every setting of a frozen dataclass, from its __post_init__, and bring each into its own form: a list becomes a
    tuple, a whole number a float where the field is one. Raises SettingError."""
    for declared in settings_of(type(configuration)):
        value = declared.checked(getattr(configuration, declared.name), declared.name)
        object.__setattr__(configuration, declared.name, value)


def shown(value: Any) -> str:
    """Return a value as an error quotes it: short, and in TOML's spelling."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} values" if value[1:] else "a list of one value" if value else "an empty list"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return _QUOTE.repr(value)


def as_toml(value: Any) -> str:
    """Return a value as config.toml spells it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
