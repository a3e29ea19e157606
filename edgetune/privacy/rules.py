"""Reads rules.toml, the data by which secrets and identifiers are recognised, and compiles what it says once."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

_WHOLE = r"(?<![^\W_])(?:{words})(?![^\W_])"
"""A pattern for words that are no part of a longer word. An underscore may stand beside them."""
_LONG = r"(?:{words})(?:s|_?\d{{1,2}})?(?![^\W_])"
_NAMED = r"(?P<key>(?:{words})(?:s|_?\d{{1,2}})?(?![^\W_]))"
_FILE = Path(__file__).with_name("rules.toml")
_SEED_WORDS = Path(__file__).with_name("bip39_english.txt")


@dataclass(frozen=True)
class NumberRule:
    """A national number: its form, python-stdnum's module that checks it, and the words beside which it stands."""

    module: str
    form: re.Pattern[str]
    names: tuple[str, ...]
    named: bool
    """True if it counts only beside one of `names`: too many other numbers pass its check."""
    letters: bool


@dataclass(frozen=True)
class Rules:
    """The compiled rules. Patterns named `..._word` are searched in lower-case text."""

    version: int
    token: re.Pattern[str]
    """A token that its issuer marks, at the beginning of a word."""
    secret_words: dict[str, re.Pattern[str]]
    """By the letters with which they begin: words beside which a password, a PIN (group pin) or a key (group key) stands."""
    commands: tuple[str, ...]
    """Programs that take a password as an option."""
    about: re.Pattern[str]
    """Words between such a word and its value: "for the router is"."""
    no_passwords: frozenset[str]
    digest_word: re.Pattern[str]
    """A word that says that a hexadecimal number is a digest or a name, and no key."""
    phone_word: re.Pattern[str]
    regions: tuple[str, ...]
    numbers: tuple[NumberRule, ...]
    lettered: re.Pattern[str]
    """Any national number with letters in it."""


@functools.cache
def rules() -> Rules:
    """Return the rules."""
    data = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    passwords, named, phone = data["password"], data["named"], data["phone"]
    numbers = tuple(
        NumberRule(
            rule["module"],
            re.compile(rule["regex"]),
            tuple(rule.get("names", ())),
            rule.get("named", False),
            rule.get("letters", False),
        )
        for rule in data["number"]
    )
    return Rules(
        version=data["version"],
        token=re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(rule['regex'] for rule in data['token'])})"),
        secret_words=_by_stem(passwords["long"], passwords["short"], passwords["pin"], named["words"]),
        commands=tuple(passwords["commands"]),
        about=re.compile(
            rf"(?: (?:{_any(passwords['about'])}) [^\n:=|]{{1,40}}?)?(?: (?:{_any(passwords['between'])})\b:?)",
            re.IGNORECASE,
        ),
        no_passwords=frozenset(passwords["not_one"]),
        digest_word=re.compile(_any(named["digests"])),
        phone_word=re.compile(rf"(?<![^\W\d_])(?:{_any(phone['words'])})"),
        regions=tuple(phone["regions"]),
        numbers=numbers,
        lettered=re.compile(rf"(?<![\w-])(?:{'|'.join(rule.form.pattern for rule in numbers if rule.letters)})(?![\w-])"),
    )


@functools.cache
def seed_words() -> frozenset[str]:
    """Return the 2,048 English words of BIP-39, from which wallets make seed phrases."""
    return frozenset(_SEED_WORDS.read_text(encoding="ascii").split())


def _by_stem(long: list[str], short: list[str], pins: list[str], named: list[str]) -> dict[str, re.Pattern[str]]:
    """Return a pattern for all words that begin alike, by that beginning, which is one of the words.

    Python finds a fixed text many times faster than one of a hundred words.
    """
    words = {*long, *short, *pins, *named}
    stems = [word for word in words if not any(word != other and word.startswith(other) for other in words)]
    patterns = {}
    for stem in sorted(stems):
        below = [[word for word in group if word.startswith(stem)] for group in (long, short, pins, named)]
        options = [
            form.format(words=_any(group))
            for form, group in zip((_LONG, _WHOLE, f"(?P<pin>{_WHOLE})", _NAMED), below, strict=True)
            if group
        ]
        patterns[stem] = re.compile("|".join(options))
    return patterns


def _any(words: list[str]) -> str:
    """Return a pattern for any of `words`, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))
