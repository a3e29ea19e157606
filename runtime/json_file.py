"""Parses JSON that another program may have written: every fault becomes one sentence for the user."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from edgetune.runtime.untrusted_file import MAX_DIGITS, FileKind, read_untrusted


def parse(data: bytes) -> Any:
    """Return the JSON value in `data`, UTF-8 with or without a byte order mark.

    Raises ValueError, which says what is wrong, also for what Python's parser accepts and JSON does not: a name that an object
    holds twice, NaN and Infinity, a number that is infinite as a double, half of a surrogate pair.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_decimal,
        )
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error
    if b"\\u" in data:
        _refuse_surrogates(value)
    return value


def read_value(path: Path, kind: FileKind) -> Any:
    """Return the JSON value in a file. Raises `kind.error` as `read_untrusted` does, and for anything that is not JSON."""
    try:
        return parse(read_untrusted(path, kind))
    except ValueError as error:
        fault = error.args[0] if type(error) is ValueError else "its syntax is wrong"
        raise kind.error(f"{path} is not valid JSON ({fault}); {kind.advice}.") from error


def read_object(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `kind.error` as `read_value` does, and for any other JSON value."""
    value = read_value(path, kind)
    if not isinstance(value, dict):
        raise kind.error(f"{path} does not hold a JSON object; {kind.advice}.")
    return value


def read_object_if_there(path: Path, kind: FileKind) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if nothing has this name. Raises `kind.error` as `read_object` does."""
    return read_object(path, kind) if os.path.lexists(path) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is repeated")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _decimal(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if math.isinf(value):
        raise ValueError("it holds a number that is too large")
    return value


def _refuse_surrogates(value: Any) -> None:
    """Raise ValueError if any string of a JSON value holds half of a surrogate pair, which no text in UTF-8 can hold."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
            raise ValueError("it holds half of a surrogate pair")
