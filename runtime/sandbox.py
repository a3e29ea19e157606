"""Run Jinja templates that nobody vouches for: jinja2's immutable sandbox, with limits on memory and time.

jinja2's sandbox keeps a template away from Python, but does not keep it from using up memory or time. So every place
where a template can make a value or repeat a loop passes through a `Meter` (see `template_limits`), which limits

 - the size of each value, before or while it is made (`'a' * 10**9`, `replace`, `%1000000d`, lists that hold another
   list twice),
 - the size of all values together, and of the output,
 - CPU time, checked on every call, filter, test, comparison, concatenation and turn of a loop. Whatever runs between
   two checks works on values of limited size and takes milliseconds. So no signal, second thread or second process is
   needed, and the limit holds on any thread and any platform. It counts the CPU time of this thread: a machine that is
   busy or was asleep fails no template.

`_Hooks` puts the checks into the parsed template, so a template cannot go around them.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edgetune.runtime.template_limits import (
    DEEPEST_TREE,
    LARGEST_INT_BITS,
    LARGEST_TREE,
    METER,
    QUADRATIC,
    SHORT,
    TOO_DEEP,
    Refused,
    check_filter,
    check_format,
    check_int_arguments,
    check_method,
    check_operator,
)

_STR_METHODS = QUADRATIC | set(
    """capitalize center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join ljust lower partition removeprefix removesuffix replace rjust split
    splitlines startswith swapcase title unescape upper zfill""".split()  # noqa: SIM905
)
_METHODS: tuple[tuple[type, set[str]], ...] = (
    (str, _STR_METHODS),
    (Mapping, {"get", "items", "keys", "values", "copy"}),
    (list, {"copy", "count", "index"}),
    (tuple, {"count", "index", "grouper", "list"}),  # the last two are fields of what the filter groupby returns
    (int, {"bit_length"}),
    (float, {"is_integer"}),
)
"""The methods that a template may call, by the type that has them. Others (encode, expandtabs, translate) are refused."""

_FILTERS = """abs batch capitalize count d default dictsort e escape first float forceescape format groupby indent int
    items join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice
    sort string sum title trim truncate unique upper urlencode wordcount""".split()  # noqa: SIM905
"""jinja2's own filters, without those that write HTML (urlize), use chance (random) or make text of any width (center)."""
_Wrapped = Callable[..., Any]


class Raised(Exception):
    """The template called raise_exception."""


def _metered_filter(name: str, function: _Wrapped) -> _Wrapped:
    """Return the filter `function` with its arguments checked and its result counted.

    pass_context is for more than the context: jinja2 runs a filter that has it while rendering only. Others it may run
    on constants while compiling, when there is no meter yet.
    """
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function, updated=())
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        check_int_arguments(args, kwargs)
        meter.made(args)
        value = meter.made(value) if isinstance(value, Iterator) else value
        check_filter(meter, name, value, args, kwargs)
        given = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        first: tuple[Any, ...] = given[wants.name] if wants is not None else ()
        return meter.made(function(*first, value, *args, **kwargs))

    return metered


def _metered_test(function: _Wrapped) -> _Wrapped:
    """Return the test `function` (`x is defined`) with the clock checked before it, while rendering only."""
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function, updated=())
    def metered(context: Context, *args: Any) -> Any:
        METER.get().tick()
        return function(*((context.environment,) if wants is not None else ()), *args)

    return metered


_OTHER_TEMPLATES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
"""Tags that name another template. There is none; like scoped blocks, each writes all variables into the compiled code."""


def _check_tree(tree: nodes.Template) -> None:
    """Raise Refused for a parsed template that would take long to compile: too many nodes, too deep, or other templates."""
    pending: list[tuple[nodes.Node, int]] = [(tree, 0)]
    count = 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > LARGEST_TREE:
            raise Refused(f"it has more than {LARGEST_TREE:,} parts")
        if depth > DEEPEST_TREE:
            raise Refused(TOO_DEEP)
        if isinstance(node, _OTHER_TEMPLATES) or (isinstance(node, nodes.Block) and node.scoped):
            raise Refused("it refers to another template")
        pending += [(child, depth + 1) for child in node.iter_child_nodes()]


class _Hooks(NodeTransformer):
    """Rewrites a parsed template so that loops, literals, slices, comparisons and concatenations pass through the meter."""

    def _filtered(self, hook: str, node: nodes.Node) -> nodes.Filter:
        """Return a node that applies the filter `hook` to what `node` gives."""
        return nodes.Filter(node, hook, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered("_ticks", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._filtered("_tick", node.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def _made(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered("_made", node)

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
    """Renders the body of `{% generation %}`, with which templates mark the assistant's words for other programs."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares them so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """jinja2's namespace, with each value that is put into it counted by the meter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self` by name, so that an attribute may have that name
        Namespace.__init__(args[0], METER.get().made(dict(*args[1:], **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, METER.get().made(value))


def _raise_exception(message: Any = "") -> None:
    """Raise Raised with the template's own message, as transformers' templates do for a conversation they refuse."""
    raise Raised(message if isinstance(message, str) else "")


def _strftime_now(form: str) -> str:
    """Return the time now in strftime's format. Raises Refused for a format with a width of three digits or more."""
    if len(form) > SHORT or re.search(r"\d{3,}", form):
        raise Refused("it formats the date too widely")
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return `value` as JSON, as transformers' tojson does; jinja2's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """A jinja2 environment whose templates run inside the sandbox and the limits of the meter in METER."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # optimized=False: jinja2's optimizer would compute constant expressions while compiling, without any meter.
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
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
        """Join parts of the output, and stop before they exceed the limit of a value."""
        meter, size, kept = METER.get(), 0, []
        for part in parts:
            size += meter.weigh(part)[0]
            meter.fits(size)
            kept.append(part)
        return str(meter.made("".join(kept)))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        _check_tree(parsed)
        tree = _Hooks().visit(parsed)
        assert isinstance(tree, nodes.Template)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may use this attribute of `obj`."""
        # A list of what is allowed: a method that Python adds to str later stays refused until somebody looks at it.
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Return the undefined value for a forbidden attribute. Raises Refused for one that begins with an underscore."""
        if attribute.startswith("_"):
            raise Refused("it reaches for Python's internals")
        return super().unsafe_undefined(obj, attribute)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or item, with the clock checked before it."""
        METER.get().tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item or attribute, with the clock checked before it."""
        METER.get().tick()
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format or str.format_map with its arguments checked; None if `value` is neither."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(METER.get(), value.__self__, (*args, kwargs))
            return function(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method with its arguments checked and its result counted."""
        meter, owner = METER.get(), getattr(__obj, "__self__", None)
        meter.tick()
        check_int_arguments(args, kwargs)
        if isinstance(owner, str):
            check_method(meter, owner, getattr(__obj, "__name__", ""), args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else meter.made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator with its operands checked and its result counted."""
        meter = METER.get()
        check_operator(meter, operator, left, right)
        result = meter.made(super().call_binop(context, operator, left, right))
        if isinstance(result, int) and result.bit_length() > LARGEST_INT_BITS:
            raise Refused("it computes too large a number")
        return result
