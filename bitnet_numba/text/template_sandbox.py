"""Jinja's sandbox with limits on time and memory, for templates that come with a model and are not trusted.

Jinja's own sandbox keeps templates away from files and code, but does not limit their work. Here every loop step, call,
filter and piece of output goes through `_charge`, which checks the time and adds up sizes. Operations whose result can
be much larger than their input (repetition, formatting, joining, replacing) are estimated beforehand. Filters and
methods that published chat templates do not use are not available.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from time import monotonic
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0  # per rendering; published templates take milliseconds
MAX_SIZE = 1_000_000  # characters and items in one value, in addition to four times the conversation
MAX_VALUES = 50  # total size that one rendering may create, in values of the maximum size
MAX_INTEGER_BITS = 1024
MAX_INDENT = 100  # columns

FILTERS = """abs capitalize count d default dictsort e escape first float format groupby indent int items join last
    length list lower map max min reject rejectattr replace reverse safe select selectattr sort string sum title trim
    unique upper wordcount""".split()
METHODS = frozenset(
    """capitalize casefold count endswith find format get index isalnum isalpha isdecimal isdigit islower isspace
    istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper values""".split()
)
_CONTAINERS = (list, tuple, dict, set)
_PLAIN = (str, bytes, int, float, *_CONTAINERS)
_WIDE = re.compile(r"\d{3}|\*|:[^}]*\{")  # in a format string: a width of three digits, or one that is an argument

# Filters that only rewritten templates can use: no name in a template contains a space.
_STEPS, _VALUE = "loop steps", "value made"


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Renders templates within the limits, otherwise raises SecurityError. Call `begin` before each rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # Trimmed blocks and loop controls: as in Hugging Face's renderer. Without the optimizer, and with a `finalize`
        # that needs a context, nothing is evaluated at compile time.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=pass_context(lambda context, value: self._charge(value)),
        )
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        known = {name: self.filters[name] for name in FILTERS}
        known["indent"] = _bounded_indent(known["indent"])
        known["tojson"] = self._to_json
        self.filters = {name: self._bounded(name, function) for name, function in known.items()}
        self.filters |= {_STEPS: self._steps, _VALUE: self._charge}
        self.begin(0)

    def begin(self, size: int) -> None:
        """Resets the limits, for a conversation with `size` characters."""
        self._deadline = monotonic() + SECONDS
        self._max_size = MAX_SIZE + 4 * size
        self._budget = MAX_VALUES * self._max_size

    def compile_bounded(self, source: str) -> Any:
        """Compiles a template so that every loop step and every new value is charged."""
        if len(source) > MAX_SIZE:
            raise SecurityError(f"it has {len(source):,} characters")
        return self.from_string(_Rewriter().visit(self.parse(source)))

    def render_pieces(self, pieces: Iterable[str]) -> str:
        """Joins pieces of text, as Jinja joins the output of each block. SecurityError beyond the maximum size."""
        parts, size = [], 0
        for piece in pieces:
            size += len(piece)
            if size > self._max_size:
                raise SecurityError("it produces too long a text")
            parts.append(piece)
        self._charge(None)
        return "".join(parts)

    concat = render_pieces  # compiled templates call it for macros and blocks

    # Operations of templates, each of them charged

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if operator == "*" and not all(isinstance(value, int | float) for value in (left, right)):
            times = next((value for value in (left, right) if isinstance(value, int)), 1)
            self._check_size(max(self._size(left), self._size(right)) * times)
        if operator == "%" and isinstance(left, str):
            self._check_format(left, left.count("%"), right)
        return self._charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        args = tuple(__self._counted(value) for value in args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, LoopContext):  # a recursive loop
            args = (__self._steps(args[0]), *args[1:]) if args else args
        elif isinstance(owner, str) and name in ("join", "replace"):
            args = __self._check_built(name, (owner, *args))[1:]
        elif not isinstance(__obj, Macro):
            __self._charge([args, kwargs])
        return __self._charge(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        method = isinstance(obj, _PLAIN) and callable(value)
        return super().is_safe_attribute(obj, attr, value) and (attr in METHODS or not method)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, value.__self__.count("{"), [args, kwargs])
            return str(wrapped(*args, **kwargs))

        return bounded

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # also copies whether it wants the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self._counted(value) for value in args)
            self._charge([args, kwargs])
            # Jinja passes what the filter works on first, or behind the context that some filters want.
            own = [value for value in args if not isinstance(value, Context | nodes.EvalContext | Environment)]
            if name in ("join", "replace"):
                built = self._check_built(name, [*own, *kwargs.values()])
                args = (*args[: len(args) - len(own)], *built[: len(own)])
            elif name == "format":
                self._check_format(str(own[0]), str(own[0]).count("%"), [own[1:], kwargs])
            return self._charge(self._counted(function(*args, **kwargs)))

        return bounded

    def _to_json(
        self,
        value: Any,
        indent: int | None = None,
        ensure_ascii: bool = False,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as in Hugging Face's templates: not escaped for HTML."""
        if indent is not None:
            _check_width(indent)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.render_pieces(encoder.iterencode(value))

    # Limits

    def _charge(self, value: Any) -> Any:
        """Returns the value; raises SecurityError if it is too large or time is up."""
        if monotonic() > self._deadline:
            raise SecurityError(f"it takes longer than {SECONDS:g} seconds")
        self._budget -= self._size(value)
        if self._budget < 0:
            raise SecurityError("it produces too much text")
        return value

    def _size(self, value: Any) -> int:
        """Number of characters and items in a value, recursively; an item counts as often as it would be printed."""
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes | range):
                size += 1 + len(item)
            elif isinstance(item, _CONTAINERS):
                size += 1 + len(item)
                stack += [*item, *item.values()] if isinstance(item, dict) else item
            elif isinstance(item, int) and item.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("a number is too large")
            elif isinstance(item, Namespace):  # one that contains itself exceeds the limit here
                size += 1
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            else:
                size += 1
            if size > self._max_size:
                raise SecurityError("a value is too long")
        return size

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._charge(None)
            yield value

    def _counted(self, value: Any) -> Any:
        """Wraps iterators, whose items cannot be measured yet, so that each step is charged."""
        return self._steps(value) if isinstance(value, Iterator) else value

    def _check_size(self, size: int) -> None:
        """Raises SecurityError if a result of this size would be too large."""
        if size > self._max_size:
            raise SecurityError("a value is too long")

    def _check_format(self, form: str, fields: int, values: Any) -> None:
        if _WIDE.search(form):
            raise SecurityError("such a wide format is not allowed")
        self._check_size(len(form) + fields * (99 + self._size(values)))

    def _check_built(self, name: str, args: Iterable[Any]) -> tuple[Any, ...]:
        """Checks and returns the arguments of replace (text, old, new) or join (items and separator, in any order)."""
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        sizes = [self._size(value) for value in args]
        if name == "replace" and len(args) > 2:
            self._check_size(sizes[0] + str(args[0]).count(str(args[1])) * sizes[2])
        elif name == "join" and len(args) > 1:
            texts = [value for value in args if isinstance(value, str)]
            items = max(len(value) for value in args if isinstance(value, Sized))
            self._check_size(sum(sizes) + items * sum(len(text) for text in texts))
        return args


class _Rewriter(NodeTransformer):
    """Passes the iterable of every loop and every value that a template creates or stores through a filter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _STEPS)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _filtered(node.node, _VALUE)
        return node

    def _charged(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _VALUE)

    visit_List = visit_Dict = _charged

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filtered(part, _VALUE) for part in node.nodes]  # each is converted to a string first
        return _filtered(node, _VALUE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._charged(node) if node.ctx == "load" else node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _bounded_indent(function: Callable[..., str]) -> Callable[..., str]:
    def bounded(text: str, width: Any = 4, *args: Any, **kwargs: Any) -> str:
        _check_width(width)
        return function(text, width, *args, **kwargs)

    return bounded


def _check_width(width: Any) -> None:
    if (len(width) if isinstance(width, str) else width) > MAX_INDENT:
        raise SecurityError("such a wide indentation is not allowed")


def size_of(messages: Iterable[Mapping[str, Any]]) -> int:
    """Number of characters in a conversation's contents."""
    return sum(len(message["content"]) for message in messages)
