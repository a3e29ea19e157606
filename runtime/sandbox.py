"""Jinja for templates that nobody vouches for: the immutable sandbox, and limits that hold.

The sandbox keeps a template away from Python; what it does not do is keep it from eating the machine. So every place
where a template can make a value or go round a loop passes through a `Meter`, which bounds

 - each value's size, before or as it is made (`'a' * 10**9`, `replace`, `%1000000d`, lists that hold themselves twice),
 - what all values made take together, and the output,
 - CPU time, looked at on every call, filter, test, comparison, concatenation and loop turn. What lies between two looks
   works on values of bounded size and takes milliseconds, so no signal, second thread or second process is needed, and
   it holds on any thread and any platform. It is this thread's CPU time: a busy or sleeping machine fails no template.

The hooks are put into the parsed template (`_Hooks`), so a template cannot step round them.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

BASE_BYTES = 1 << 20  # a value, and the output, may take this and eight times what was given
GIVEN_BYTES = 64 << 20
CPU_SECONDS = 0.5  # real conversations take milliseconds
DEEPEST = 64  # nesting of lists and dicts
LARGEST_INT = 100_000  # as an argument: widths, counts, precisions
SHORT = 64  # characters, where the search is quadratic in CPython


class Refused(Exception):
    """A limit was reached; the text is ours and safe to show."""


class Raised(Exception):
    """The template called raise_exception."""


class Meter:
    """What one rendering may still use."""

    def __init__(self, given: Any) -> None:
        self._deadline = time.thread_time() + CPU_SECONDS
        self._known: dict[int, tuple[Any, int, int]] = {}
        self.limit = GIVEN_BYTES
        self.limit = BASE_BYTES + 8 * self.weigh(given)[0]
        self._left = 64 * self.limit

    def tick(self, value: Any = None) -> Any:
        """Look at the clock; the value passes through."""
        if time.thread_time() > self._deadline:
            raise Refused(f"it ran for more than {CPU_SECONDS:g} s")
        return value

    def fits(self, size: int) -> None:
        """Refuse a value of `size` bytes before it is made."""
        if size > self.limit:
            raise Refused("it makes a value of more than the allowed size")

    def made(self, value: Any) -> Any:
        """Account for a value that the template made."""
        self.tick()
        if isinstance(value, Iterator):
            value = list(self.ticks(value))
        size = self.weigh(value)[0]
        self.fits(size)
        self._left -= size
        if self._left < 0:
            raise Refused("the values it makes take too much memory")
        return value

    def ticks(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value

    def weigh(self, value: Any, depth: int = 0) -> tuple[int, int]:
        """(bytes, nesting) of `value` written out, counting what stands twice twice.

        Containers cannot be changed inside the sandbox, so each is walked once and remembered (and kept alive).
        """
        if isinstance(value, str):
            return 8 + len(value) * (1 if value.isascii() else 4), 0
        if isinstance(value, int):
            return 8 + value.bit_length(), 0
        if not isinstance(value, list | tuple | Mapping | AbstractSet):
            if isinstance(value, Namespace):  # the one thing that can change, so it is never part of another value
                raise Refused("it uses a namespace as a value")
            return 8 * len(value) if isinstance(value, range) else 8, 0
        if depth > DEEPEST:
            raise Refused("it nests lists too deeply")
        known = self._known.get(id(value))
        if known is None:
            size, nesting = 8, 0
            for item in value.items() if isinstance(value, Mapping) else value:
                item_size, item_nesting = self.weigh(item, depth + 1)
                size, nesting = size + item_size, max(nesting, item_nesting)
                self.fits(size)
            if nesting >= DEEPEST:
                raise Refused("it nests lists too deeply")
            known = self._known[id(value)] = (value, size, nesting + 1)
        return known[1], known[2]


METER: ContextVar[Meter] = ContextVar("edgetune_template_meter")


# --- what each operation could make, refused before it does -----------------------------------------------------------


def _check_replace(meter: Meter, text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(old, str):
        times = text.count(old) if old else len(text) + 1
        meter.fits(meter.weigh(text)[0] + times * meter.weigh(new)[0])


def _check_join(meter: Meter, glue: Any, values: Any) -> None:
    if isinstance(values, Sequence | AbstractSet | Mapping):
        meter.fits(meter.weigh(values)[0] + len(values) * meter.weigh(glue)[0])


_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
_WIDE_BRACES = re.compile(r"\{[^}]*:[^}]*(?:\d{4,}|\{)")


def _check_format(meter: Meter, text: str, values: Any) -> None:
    if len(text) > 4096 or _WIDE_PERCENT.search(text) or _WIDE_BRACES.search(text):
        raise Refused("it formats text too widely")
    fields = text.count("%") + text.count("{")
    meter.fits(meter.weigh(text)[0] + fields * (1000 + 4 * meter.weigh(values)[0]))


def _check_int_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise Refused(f"it passes a number larger than {LARGEST_INT}")


_QUADRATIC = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"}
_STR_METHODS = _QUADRATIC | set(
    """capitalize center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join ljust lower partition removeprefix removesuffix replace rjust split
    splitlines startswith swapcase title unescape upper zfill""".split()  # noqa: SIM905
)
_METHODS: tuple[tuple[type, set[str]], ...] = (
    (str, _STR_METHODS),
    (Mapping, {"get", "items", "keys", "values", "copy"}),
    (list, {"copy", "count", "index"}),
    (tuple, {"count", "index", "grouper", "list"}),  # the last two: what groupby gives
    (int, {"bit_length"}),
    (float, {"is_integer"}),
)


def _check_method(meter: Meter, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name == "replace":
        _check_replace(meter, owner, *args, **kwargs)
    elif name == "join" and args:
        _check_join(meter, owner, args[0])
    elif name in _QUADRATIC and args and isinstance(args[0], str) and len(args[0]) > SHORT:
        raise Refused(f"it searches for more than {SHORT} characters")


def _check_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name == "replace":
        _check_replace(meter, str(value), *args, **kwargs)
    elif name == "join":
        _check_join(meter, args[0] if args else kwargs.get("d", ""), value)
    elif name == "format":
        _check_format(meter, str(value), (*args, kwargs))
    elif name == "sum" and not all(isinstance(start, int | float) for start in (*args[1:], kwargs.get("start", 0))):
        raise Refused("it sums what are not numbers")
    elif name in ("trim", "tojson", "indent"):
        given = (*args, *kwargs.values())
        if any(len(item) > SHORT for item in given if isinstance(item, str)) or any(
            len(str(part)) > SHORT for item in given if isinstance(item, list | tuple) for part in item
        ):
            raise Refused(f"it passes {name} more than {SHORT} characters")
        width = max((item if isinstance(item, int) else SHORT for item in given), default=0)
        size, nesting = meter.weigh(value)
        lines = str(value).count("\n") + 1 if name == "indent" else size * nesting
        meter.fits(size + lines * width)


# --- the environment --------------------------------------------------------------------------------------------------

# Jinja's own, less those that need the network's forms, chance or width without end.
_FILTERS = """abs batch capitalize count d default dictsort e escape first float forceescape format groupby indent int
    items join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice
    sort string sum title trim truncate unique upper urlencode wordcount""".split()  # noqa: SIM905
_Wrapped = Callable[..., Any]


def _metered_filter(name: str, function: _Wrapped) -> _Wrapped:
    """`function` with its arguments checked, its result weighed, and never run at compile time (pass_context)."""
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function, updated=())
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        _check_int_arguments(args, kwargs)
        meter.made(args)
        value = meter.made(value) if isinstance(value, Iterator) else value
        _check_filter(meter, name, value, args, kwargs)
        given = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        first: tuple[Any, ...] = given[wants.name] if wants is not None else ()
        return meter.made(function(*first, value, *args, **kwargs))

    return metered


def _metered_test(function: _Wrapped) -> _Wrapped:
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function, updated=())
    def metered(context: Context, *args: Any) -> Any:
        METER.get().tick()
        return function(*((context.environment,) if wants is not None else ()), *args)

    return metered


class _Hooks(NodeTransformer):
    """Send loops, literals, slices, comparisons and concatenations through the meter."""

    def _through(self, hook: str, node: nodes.Node) -> nodes.Filter:
        return nodes.Filter(node, hook, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through("_ticks", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through("_tick", node.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def _made(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self._made(node)
        self.generic_visit(node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return self._made(node)
        self.generic_visit(node)
        return node

    visit_List = visit_Dict = _made


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for others; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way of declaring them)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace, whose values pass through the meter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that an attribute may be named `self`
        Namespace.__init__(args[0], METER.get().made(dict(*args[1:], **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, METER.get().made(value))


def _raise_exception(message: Any = "") -> None:
    raise Raised(message if isinstance(message, str) else "")


def _strftime_now(form: str) -> str:
    if len(form) > SHORT or re.search(r"\d{3,}", form):
        raise Refused("it formats the date too widely")
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """transformers' tojson: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.concat = self._concat  # type: ignore[method-assign]
        self.finalize = pass_context(lambda context, value: METER.get().made(value))
        self.filters = {name: _metered_filter(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = _metered_filter("tojson", _tojson)
        self.filters["_ticks"] = pass_context(lambda context, values: METER.get().ticks(values))
        self.filters["_tick"] = pass_context(lambda context, value: METER.get().tick(value))
        self.filters["_made"] = pass_context(lambda context, value: METER.get().made(value))
        self.filters["_concat"] = pass_context(lambda context, values: self._concat(map(str, METER.get().made(values))))
        self.tests: dict[str, Any] = {name: _metered_test(test) for name, test in self.tests.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "joiner", "cycler")}
        self.globals["namespace"] = _Namespace
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _concat(self, parts: Iterable[str]) -> str:
        meter, size, kept = METER.get(), 0, []
        for part in parts:
            size += meter.weigh(part)[0]
            meter.fits(size)
            kept.append(part)
        return str(meter.made("".join(kept)))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Hooks().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        if attribute.startswith("_"):
            raise Refused("it reaches for Python's internals")
        return super().unsafe_undefined(obj, attribute)

    def getattr(self, obj: Any, attribute: str) -> Any:
        METER.get().tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        METER.get().tick()
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(METER.get(), value.__self__, (*args, kwargs))
            return function(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter, owner = METER.get(), getattr(__obj, "__self__", None)
        meter.tick()
        _check_int_arguments(args, kwargs)
        if isinstance(owner, str):
            _check_method(meter, owner, getattr(__obj, "__name__", ""), args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else meter.made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and not numbers:
                    meter.fits(times * (meter.weigh(value)[0] - 8))
        elif operator == "**" and numbers and left.bit_length() * abs(right) > 4096:
            raise Refused("it computes too large a number")
        elif operator == "%" and isinstance(left, str):
            _check_format(meter, left, right)
        result = meter.made(super().call_binop(context, operator, left, right))
        if isinstance(result, int) and result.bit_length() > 4096:
            raise Refused("it computes too large a number")
        return result
