"""Match the keys of PEFT's alpha_pattern against the names of modules, in linear time.

PEFT takes each key as a regular expression: re.match(rf"(.*\\.)?({key})$", name). An untrusted expression can run for years, so
only plain ones are read: characters, classes and alternatives, each character repeated or not. They are matched by following
all possibilities at once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from edgetune.runtime.untrusted_file import LONGEST_PATTERN, MAX_ALTERNATIVES, MAX_PATTERNS

_PLAIN = re.compile(r"[\w.]+")
_ATOM = re.compile(r"(\\[.\-dw]|\[\^?[\w.\-\\]+\]|[\w.\-])([*+?]?)")
_GROUP = re.compile(r"\((?:\?:)?([^()]*)\)")

Atom = tuple[re.Pattern[str], str]
"""A set of characters, and how often one of them must come: "", "?", "*" or "+"."""


class ModulePattern:
    """A key that stands for modules: the end of their names, or a plain regular expression.

    Raises ValueError for any other expression, with the fault as a clause.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.is_name = _PLAIN.fullmatch(key) is not None
        self._ways = [] if self.is_name else _compile(key)

    def matches(self, name: str) -> bool:
        """Return True if the key stands for the module of this name."""
        if not self.is_name:
            return any(_follow(way, name) for way in self._ways)
        start = len(name) - len(self.key)
        # A dot stands for any character, as in every regular expression.
        ends = start >= 0 and all(a in (b, ".") for a, b in zip(self.key, name[start:], strict=True))
        return ends and (start == 0 or name[start - 1] == ".")


def patterns(keys: Iterable[str]) -> list[ModulePattern]:
    """Return the patterns of keys, in their order. Raises ValueError for one that is not plain, and for too many of them."""
    found = [ModulePattern(key) for key in keys]
    if sum(not pattern.is_name for pattern in found) > MAX_PATTERNS:
        raise ValueError(f"it has more than {MAX_PATTERNS} regular expressions")
    return found


def _compile(key: str) -> list[list[Atom]]:
    """Return the ways in which a name can match: each a sequence of atoms for the whole name."""
    if len(key) > LONGEST_PATTERN:
        raise ValueError("a key is too long")
    text = key.removesuffix("$").removeprefix("^")
    if "|" in _GROUP.sub("", text):
        text = f"({text})"
    anywhere = "" if key.startswith("^") else r"(?:|.*\.)"  # PEFT allows a prefix before what is not anchored
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(_GROUP.split(anywhere + text))]
    if math.prod(map(len, choices)) > MAX_ALTERNATIVES:
        raise ValueError(f"the key {key[:40]!r} has too many alternatives")
    try:
        return [_atoms("".join(way)) for way in itertools.product(*choices)]
    except re.error as error:
        raise ValueError(f"the key {key[:40]!r} is not a regular expression") from error


def _atoms(text: str) -> list[Atom]:
    atoms, position = [], 0
    while position < len(text):
        match = _ATOM.match(text, position)
        if match is None:
            raise ValueError(f"a key has {text[position]!r}, where edgetune reads only characters, classes and alternatives")
        atoms.append((re.compile(match[1]), match[2]))
        position = match.end()
    return atoms


def _follow(atoms: list[Atom], name: str) -> bool:
    """Return True if the atoms match the whole of `name`."""
    places = _and_behind_optional(atoms, {0})
    for character in name:
        moved = set()
        for place in places:
            if place < len(atoms) and atoms[place][0].fullmatch(character):
                moved |= {place, place + 1} if atoms[place][1] in ("*", "+") else {place + 1}
        places = _and_behind_optional(atoms, moved)
    return len(atoms) in places


def _and_behind_optional(atoms: list[Atom], places: set[int]) -> set[int]:
    """Return the places, and those behind atoms that may match nothing."""
    reached = set(places)
    for place in range(len(atoms)):
        if place in reached and atoms[place][1] in ("*", "?"):
            reached.add(place + 1)
    return reached
