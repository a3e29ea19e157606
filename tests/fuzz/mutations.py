"""Changes valid inputs at random: bytes of any format, and the structure of JSON and safetensors; a seed decides."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

BOUNDARIES = (
    0,
    1,
    7,
    8,
    64,
    127,
    255,
    256,
    1023,
    2**15,
    2**16 - 1,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63,
    2**64 - 1,
)
"""Integers at which counts, sizes and offsets go wrong."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x" * 300, "\ud800", "\0", "8", "1e-5", "NaN", 0, 1, -1, 2.5, -0.0, 1e308, 1e-320, 10**30, 2**31,
        2**63,
    [], [[]], {}, [0], ["x"], {"": 0}, [None] * 50, float("nan"), float("inf"),
)  # fmt: skip
"""JSON values of every type, and some that JSON has no spelling for."""
PIECES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x80",
    b"\\ud800",
    b"[" * 2000,
    b'{"a":' * 500,
    b"\r",
    b"\n---\n",
    b"9" * 500,
)
"""Bytes that parsers stumble over: marks, half surrogates, deep brackets, rulers, long numbers."""
Bytes = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutate(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds after one to four changes."""
    data = chance.choice(seeds)
    for _ in range(chance.randint(1, 4)):
        change = chance.choice(_CHANGES if chance.random() < 0.5 else (change_json,))
        data = change(chance, data, seeds)
    return data


def flip(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Flip one bit in up to eight bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Cut the data off, or cut a stretch out of it."""
    start = chance.randint(0, len(data))
    return data[:start] + (data[start + chance.randint(1, 64) :] if chance.random() < 0.6 else b"")


def splice(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Go on with the end of another seed."""
    other = chance.choice(seeds)
    return data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]


def repeat(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Repeat a stretch."""
    start = chance.randint(0, len(data))
    stretch = data[start : start + chance.randint(1, 200)]
    return data[:start] + stretch * chance.choice((2, 3, 50)) + data[start:]


def insert(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Insert bytes that parsers stumble over."""
    at = chance.randint(0, len(data))
    return data[:at] + chance.choice(PIECES) + data[at:]


def write_integer(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Write a boundary integer of one to eight bytes over others, in either byte order; near the front, where headers are."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randint(0, min(len(data), 400) if chance.random() < 0.7 else len(data))
    value = chance.choice(BOUNDARIES) % (1 << 8 * size)
    order = "little" if chance.random() < 0.8 else "big"
    return data[:at] + value.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def write_number(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Replace a number that is written in digits."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?([eE]-?\d+)?", data))
    if not numbers:
        return data
    found = chance.choice(numbers)
    value = chance.choice(
        (str(chance.choice(BOUNDARIES)), f"-{chance.choice(BOUNDARIES)}", "1e999", "0.5", "NaN", "-0", '"8"', "9" * 500)
    )
    return data[: found.start()] + value.encode() + data[found.end() :]


def change_json(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change a value, or a key, of the JSON in the data: the whole of it, a line of it, or the header of a safetensors file."""
    if len(data) > 8 and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8:
        end = 8 + int.from_bytes(data[:8], "little")
        header = change_json(chance, data[8:end], seeds)
        return len(header).to_bytes(8, "little") + header + data[end:]
    lines = data.split(b"\n")
    if len(lines) > 1 and chance.random() < 0.5:
        at = chance.randrange(len(lines))
        return b"\n".join([*lines[:at], change_json(chance, lines[at], seeds), *lines[at + 1 :]])
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return chance.choice(_CHANGES)(chance, data, seeds)
    places = list(_places(value))
    if not places:
        return json.dumps(chance.choice(ODD_VALUES)).encode()
    container, key = chance.choice(places)
    action = chance.random()
    if action < 0.6:
        container[key] = chance.choice(ODD_VALUES)
    elif action < 0.75:
        del container[key]
    elif action < 0.9:
        container[key] = chance.choice(places)[0]  # perhaps itself, which cannot be written
    elif isinstance(container, dict):
        container[chance.choice(("", "\ud800", "x" * 300, "__class__", f"{key}_"))] = container.pop(key)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return data
    if chance.random() < 0.1:
        text = text.replace("{", '{"model_type": 0, "r": 0, ', 1)  # a name that is given twice
    return text.encode()


def _places(value: Any) -> Any:
    """Yield (container, key) of every value inside a JSON value, up to 10,000."""
    pending, count = [value], 0
    while pending and count < 10_000:
        item = pending.pop()
        for key in list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            count += 1
            yield item, key
            pending.append(item[key])


_CHANGES: tuple[Bytes, ...] = (flip, cut, splice, repeat, insert, write_integer, write_number)
