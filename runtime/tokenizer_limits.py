"""Refuse tokenizers that would take all time or memory, because a part of tokenizer.json or tokenizer.model is absurdly large.

A small file can do much: forty normalizers that each double the letter "a" make 2**40 of one, and looking for a control token
of three million letters takes hours. The limits stand in `untrusted_file`. Each function returns what is wrong, or None.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from edgetune.runtime.special_tokens import AddedToken
from edgetune.runtime.untrusted_file import LONGEST_PIECE, LONGEST_TOKEN, MOST_ADDED_TOKENS, MOST_GROWTH

_RUN = 64
"""Characters of each run in PROBE: enough for a regular expression with exponential cost to reach the library's own limit."""
PROBE = "".join(f"{text * (_RUN // len(text))}x1.\n" for text in (" ", "\n", " \n", "a", "0", ".", "aA", "\u65e5"))
"""A text with long runs of the same characters, on which a regular expression of exponential cost fails at once."""


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what libraries write to standard error: a panic in Rust prints a report of its own before it is an exception."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it is missing, full or closed
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def fault_of_tokens(added: Iterable[AddedToken], pieces: Iterable[str]) -> str | None:
    """Say what is wrong with the added tokens or the pieces of a vocabulary: too many, or too long."""
    tokens = list(added)
    if len(tokens) > MOST_ADDED_TOKENS:
        return f"has {len(tokens):,} added tokens, expected at most {MOST_ADDED_TOKENS:,}"
    for longest, limit, what in (
        (max((len(token.spelling) for token in tokens), default=0), LONGEST_TOKEN, "an added token"),
        (max(map(len, pieces), default=0), LONGEST_PIECE, "a piece"),
    ):
        if longest > limit:
            return f"has {what} of {longest:,} characters, expected at most {limit:,}"
    return None


def fault_of_normalizer(tokenizer: Any) -> str | None:
    """Say what is wrong with the normalizer of a `tokenizers.Tokenizer`: it makes texts more than MOST_GROWTH times longer."""
    from tokenizers import normalizers

    if tokenizer.normalizer is None:
        return None
    steps = list(_flat(json.loads(tokenizer.normalizer.__getstate__())))
    fault = f"has a normalizer that makes a text more than {MOST_GROWTH} times longer"
    factor, probe = 1.0, PROBE
    for step in steps:
        if any(len(str(step.get(key, ""))) > MOST_GROWTH for key in ("content", "prepend", "append")):
            return fault
        pattern = step.get("pattern") or {}
        if "Regex" in pattern:  # it may match anything, so its worst case counts
            factor *= max(1, len(step["content"]))
        probe += str(pattern.get("String", "")) * 4
        charsmap = step.get("precompiled_charsmap")
        if charsmap and longest_replacement(base64.b64decode(charsmap)) > MOST_GROWTH:
            return fault
    if factor > MOST_GROWTH:
        return fault
    text = probe
    for step in steps:
        text = _one(step, normalizers).normalize_str(text)
        if len(text) > MOST_GROWTH * len(probe):
            return fault
    return None


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer as tokenizer.json writes it, sequences inside sequences included."""
    if state.get("type") != "Sequence":
        yield state
        return
    for step in state["normalizers"]:
        yield from _flat(step)


def _one(state: dict[str, Any], normalizers: Any) -> Any:
    """Return the normalizer of one step."""
    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": [state]}).encode())
    return made


def longest_replacement(charsmap: bytes) -> int:
    """Return the length in bytes of the longest text that a sentencepiece character map puts in place of another.

    The map is the size of a trie (u32), the trie, and the replacements, each ended by a zero byte.
    """
    trie = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + trie :].split(b"\0")), default=0)


def fault_of_sentencepiece(data: bytes) -> str | None:
    """Say what is wrong with the normalizer of a tokenizer.model: it makes texts more than MOST_GROWTH times longer.

    Reads only normalizer_spec.precompiled_charsmap, from the protobuf's own bytes. Raises ValueError for bytes that are none.
    """
    for number, spec in _fields(data):
        for inner, charsmap in _fields(spec) if number == _NORMALIZER_SPEC else ():
            if inner == _CHARSMAP and longest_replacement(charsmap) > MOST_GROWTH:
                return f"has a normalizer that makes a text more than {MOST_GROWTH} times longer"
    return None


_NORMALIZER_SPEC, _CHARSMAP = 3, 2
"""Numbers of the fields ModelProto.normalizer_spec and NormalizerSpec.precompiled_charsmap in sentencepiece_model.proto."""


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and content of each field of a protobuf message that is a string of bytes; others are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError("not a protobuf message")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the protobuf number at `at`, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not a protobuf message")
