"""Limit what a chat template may use: the size of its values, the size of all of them together, nesting, and CPU time.

A `Meter` counts for one rendering. The functions `check_...` estimate what an operation of Python would produce and
refuse it before it runs. `sandbox` sends every operation of a template through them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from string import Formatter
from typing import Any

from jinja2.utils import Namespace

# The one table of limits. All are chosen by hand.
TEMPLATE_BYTES = 64 << 10
"""The largest chat template in bytes: the longest in use (tools, reasoning) are a third of it."""
LARGEST_TREE = 10_000
"""The most nodes of a parsed template: the largest of 110 in use has 1,397."""
DEEPEST_TREE = 100
"""The deepest nesting of a parsed template, as Python's compiler recurses over it: the deepest in use has 21."""
BASE_BYTES, GROWTH = 1 << 20, 8
"""One value, and the output, may take BASE_BYTES and GROWTH times the size of the conversation."""
TOTAL = 64
"""All values of one rendering together may take this many times the limit of one value."""
GIVEN_BYTES = 64 << 20
"""The most bytes of a conversation that is rendered at all."""
CPU_SECONDS = 0.5
"""CPU time of one rendering. Real conversations take milliseconds."""
DEEPEST = 64
"""The deepest nesting of lists and mappings: Python's own functions recurse over them (repr, comparison, JSON)."""
LARGEST_INT = 100_000
"""The largest number passed to a function: it may be a width, a count or a precision, so memory grows with it."""
LARGEST_INT_BITS = 4096
"""The longest number that arithmetic may make, so that computing and writing it stays quick."""
LONGEST_FORMAT = 4096
"""The most characters of a format string, each field of which makes the result longer."""
SHORT = 64
"""The characters of a text to search for, or to strip, where CPython's search is quadratic."""


TOO_DEEP = "it is nested too deeply"


class Refused(Exception):
    """The template reached a limit. The message holds nothing of the template or the conversation, and is safe to show."""


class Meter:
    """Counts what one rendering has used, and raises Refused as soon as it exceeds a limit."""

    def __init__(self, given: Any) -> None:
        """Start the clock for a rendering of `given`, whose size decides how large a value may be."""
        self._deadline = time.thread_time() + CPU_SECONDS
        self._weighed: dict[int, tuple[Any, int, int]] = {}  # id -> (container, bytes, nesting)
        self.limit = GIVEN_BYTES  # for weighing `given` itself
        self.limit = BASE_BYTES + GROWTH * self.weigh(given)[0]
        self._left = TOTAL * self.limit

    def tick(self, value: Any = None) -> Any:
        """Return `value` as it is. Raises Refused if the CPU time is used up."""
        if time.thread_time() > self._deadline:
            raise Refused(f"it ran for more than {CPU_SECONDS:g} s")
        return value

    def ticks(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield `values` and look at the clock before each of them."""
        for value in values:
            self.tick()
            yield value

    def fits(self, size: int) -> None:
        """Raise Refused for a value of `size` bytes that exceeds the limit. Called before the value is made."""
        if size > self.limit:
            raise Refused("it makes a value of more than the allowed size")

    def made(self, value: Any) -> Any:
        """Count a value that the template made, and return it; an iterator is returned as a list."""
        self.tick()
        if isinstance(value, Iterator):
            value = list(self.ticks(value))
        size = self.weigh(value)[0]
        self.fits(size)
        self._left -= size
        if self._left < 0:
            raise Refused("the values it makes take too much memory")
        return value

    def weigh(self, value: Any, depth: int = 0) -> tuple[int, int]:
        """Return (bytes, nesting) of `value` written out; a part that is in it twice counts twice.

        Counting twice matters: `[x, x]`, repeated 30 times, takes little memory and has a billion items when printed.
        """
        if isinstance(value, str):
            return 8 + len(value) * (1 if value.isascii() else 4), 0
        if isinstance(value, int):
            return 8 + value.bit_length(), 0
        if not isinstance(value, list | tuple | Mapping | AbstractSet):
            # A namespace is the one thing that can change after it was weighed, so it may not be part of a value.
            if isinstance(value, Namespace):
                raise Refused("it uses a namespace as a value")
            return 8 * len(value) if isinstance(value, range) else 8, 0
        if depth > DEEPEST:
            raise Refused("it nests lists too deeply")
        # Containers cannot be changed inside the sandbox, so each is walked once. The entry keeps the container alive:
        # otherwise Python could give its id to another one.
        entry = self._weighed.get(id(value))
        if entry is None:
            size, nesting = 8, 0
            for item in value.items() if isinstance(value, Mapping) else value:
                item_size, item_nesting = self.weigh(item, depth + 1)
                size, nesting = size + item_size, max(nesting, item_nesting)
                self.fits(size)
            if nesting >= DEEPEST:
                raise Refused("it nests lists too deeply")
            entry = self._weighed[id(value)] = (value, size, nesting + 1)
        return entry[1], entry[2]


METER: ContextVar[Meter] = ContextVar("edgetune_template_meter")
"""The meter of the rendering that runs in this context."""


# --- checks before an operation runs ----------------------------------------------------------------------------------


def check_replace(meter: Meter, text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    """Raise Refused if `text.replace(old, new)` would exceed the limit of a value."""
    if isinstance(old, str):
        times = text.count(old) if old else len(text) + 1
        meter.fits(meter.weigh(text)[0] + times * meter.weigh(new)[0])


def check_join(meter: Meter, glue: Any, values: Any) -> None:
    """Raise Refused if `glue.join(values)` would exceed the limit of a value."""
    if isinstance(values, Sequence | AbstractSet | Mapping):
        meter.fits(meter.weigh(values)[0] + len(values) * meter.weigh(glue)[0])


# A width or precision of four digits or more, or one that is taken from the values (`*`). Keys with brackets in them, which
# Python would match in pairs, are refused, so that none can hide a width.
_WIDE_PERCENT = re.compile(r"%(?:\([^()]*\))?[-+ #0]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))|%\([^()]*(?:\(|$)")
_WIDE_SPEC = re.compile(r"\d{4,}|[{}]")


def check_percent(meter: Meter, text: str, values: Any) -> None:
    """Raise Refused if `text % values` could exceed the limit of a value."""
    if len(text) > LONGEST_FORMAT or _WIDE_PERCENT.search(text):
        raise Refused("it formats text too widely")
    _check_fields(meter, text, text.count("%"), values)


def check_format(meter: Meter, text: str, values: Any) -> None:
    """Raise Refused if `text.format(values)` could exceed the limit of a value, or if Python's own parser does not take it."""
    if len(text) > LONGEST_FORMAT:
        raise Refused("it formats text too widely")
    try:
        fields = [(name, spec) for _, name, spec, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise Refused("it formats text with a broken format") from error
    if any(_WIDE_SPEC.search(spec or "") for _, spec in fields):
        raise Refused("it formats text too widely")
    _check_fields(meter, text, len(fields), values)


def _check_fields(meter: Meter, text: str, fields: int, values: Any) -> None:
    """Raise Refused if a text with that many fields could exceed the limit of a value."""
    # A field is at most 999 digits wide or precise, with 309 digits before the point, or as long as the values: here taken
    # four times, to be safe.
    meter.fits(meter.weigh(text)[0] + fields * (2000 + 4 * meter.weigh(values)[0]))


def check_int_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Refused if an argument of any function is a number beyond LARGEST_INT."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise Refused(f"it passes a number larger than {LARGEST_INT}")


QUADRATIC = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"}
"""Methods of str that search in quadratic time in CPython, so that their argument must be SHORT."""


def check_method(meter: Meter, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Refused if the method `name` of the text `owner` could exceed a limit."""
    if name == "replace":
        check_replace(meter, owner, *args, **kwargs)
    elif name == "join" and args:
        check_join(meter, owner, args[0])
    elif name in QUADRATIC and args and isinstance(args[0], str) and len(args[0]) > SHORT:
        raise Refused(f"it searches for more than {SHORT} characters")


def check_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Refused if the filter `name`, applied to `value`, could exceed a limit."""
    if name == "replace":
        check_replace(meter, str(value), *args, **kwargs)
    elif name == "join":
        check_join(meter, args[0] if args else kwargs.get("d", ""), value)
    elif name == "format":
        check_percent(meter, str(value), (*args, kwargs))
    elif name == "sum" and not all(isinstance(start, int | float) for start in (*args[1:], kwargs.get("start", 0))):
        raise Refused("it sums what are not numbers")  # a sum of lists copies every partial sum
    elif name in ("trim", "tojson", "indent"):
        given = (*args, *kwargs.values())
        if any(len(item) > SHORT for item in given if isinstance(item, str)) or any(
            len(str(part)) > SHORT for item in given if isinstance(item, list | tuple) for part in item
        ):
            raise Refused(f"it passes {name} more than {SHORT} characters")
        # An indent is added to every line. JSON has at most a line for each byte, indented once for each level.
        width = max((item if isinstance(item, int) else SHORT for item in given), default=0)
        size, nesting = meter.weigh(value)
        lines = str(value).count("\n") + 1 if name == "indent" else size * nesting
        meter.fits(size + lines * width)


def check_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Raise Refused if `left operator right` would exceed a limit."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "*":
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and not numbers:
                meter.fits(times * (meter.weigh(value)[0] - 8))
    elif operator == "**" and numbers and left.bit_length() * abs(right) > LARGEST_INT_BITS:
        raise Refused("it computes too large a number")
    elif operator == "%" and isinstance(left, str):
        check_percent(meter, left, right)
