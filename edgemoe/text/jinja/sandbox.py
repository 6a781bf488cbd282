"""What a chat template may use: Jinja's filters, tests and methods, all of them metered."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from markupsafe import Markup

from edgemoe.text.jinja.meter import LimitExceeded, Meter
from edgemoe.text.jinja.sizes import OF_FILTERS, OF_METHODS, Predict, percent, times, width

__all__ = ["METER", "Sandbox"]

METER = "<meter>"
"""The name of a rendering's meter in its context, which no template can spell."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    "abs attr capitalize center count d default dictsort e escape first float format groupby indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select selectattr "
    "sort string sum title trim truncate unique upper"
)
"""The filters that chat templates use, and similar ones. The rest (urlize, pprint, random, ...) is for web pages."""

_SHALLOW = _words(
    "attr boolean callable count d default defined false first float integer iterable last length mapping none "
    "number sequence string true undefined"
) - {"float", "string"}
"""Filters and tests that do not look inside their value."""

_METHODS: Mapping[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha "
        "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
        "ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
    range: _words("count index start step stop"),
}
"""The attributes that templates may use on values of Python's own types."""

_LARGEST_INDENT = 256
_LARGEST_FORM = 256  # characters of strftime's argument


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's environment as transformers sets it up, with calls, filters, tests and operators metered.

    Only its parser, getattr, getitem, call, call_binop, filters and tests are in use: templates are
    interpreted (`edgemoe.text.jinja.interpreter`), as compiling one of 256 KiB takes 10 s and 800 MiB.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.filters = {
            name: _metered(FILTERS[name], OF_FILTERS.get(name), is_shallow=name in _SHALLOW)
            for name in _FILTERS
        }
        self.filters["tojson"] = pass_context(_to_json)
        self.tests = {
            name: _metered(test, is_shallow=name in _SHALLOW) for name, test in TESTS.items()
        }
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Returns whether a template may see an attribute that exists."""
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        if type(obj).__module__ == "builtins" and not isinstance(obj, types.FunctionType):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """Returns a metered replacement for a string's `format` or `format_map`, None for any other value."""
        is_method = isinstance(value, (types.MethodType, types.BuiltinMethodType))
        if not is_method or value.__name__ not in ("format", "format_map"):
            return None
        if not isinstance(value.__self__, str):
            return None
        if isinstance(value.__self__, Markup):  # its format would escape for HTML
            raise jinja2.exceptions.SecurityError("format is not for what is marked as safe")
        return _Format(value.__self__, is_map=value.__name__ == "format_map")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls a function or method for a template, metered."""
        meter: Meter = __context.parent[METER]
        if isinstance(__obj, _Format):
            return meter.made(__obj.run(__self, meter, args, kwargs))
        if isinstance(__obj, types.BuiltinMethodType):
            meter.sizes(__obj.__self__, *args, *kwargs.values())
            if predict := isinstance(__obj.__self__, str) and OF_METHODS.get(__obj.__name__):
                predict(meter, __obj.__self__, args, kwargs)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`."""
        meter: Meter = context.parent[METER]
        meter.sizes(left, right)
        if operator == "%" and isinstance(left, str):
            percent(meter, left, right)
        elif operator == "*":
            times(meter, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 0:
            meter.expect_bits(left.bit_length() * right if abs(left) > 1 else 1)
        elif operator == "+" and not isinstance(left, (int, float)):
            meter.expect(meter.size(left) + meter.size(right))
        return meter.made(super().call_binop(context, operator, left, right))


def _metered(func: Any, predict: Predict | None = None, *, is_shallow: bool) -> Callable[..., Any]:
    """Returns one of Jinja's filters or tests, with its use of memory and time metered.

    Args:
        func: the filter or test.
        predict: refuses a result that would be too large, before it is computed.
        is_shallow: it does not look inside its value.
    """
    takes = getattr(getattr(func, "jinja_pass_arg", None), "name", None)

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context.parent[METER]
        meter.step()
        meter.sizes(*(() if is_shallow else (value,)), *args, *kwargs.values())
        if predict is not None:
            predict(meter, value, args, kwargs)
        first = {None: (), "context": (context,), "eval_context": (context.eval_ctx,)}.get(
            takes, (context.environment,)
        )
        return meter.made(func(*first, value, *args, **kwargs))

    return metered


class _Format:
    """A stand-in for the method `format` or `format_map` of a string; `Sandbox.call` runs it."""

    def __init__(self, text: str, *, is_map: bool) -> None:
        self._text = text
        self._is_map = is_map

    def run(
        self, sandbox: Sandbox, meter: Meter, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> str:
        """Returns the formatted text."""
        meter.sizes(self._text, *args, *kwargs.values())
        formatter = _Formatter(sandbox, meter)
        if not self._is_map:
            return formatter.vformat(self._text, args, kwargs)
        if kwargs or len(args) != 1:
            raise TypeError("format_map() takes exactly one argument")
        return formatter.vformat(self._text, (), args[0])


class _Formatter(SandboxedFormatter):
    """Jinja's formatter, metered."""

    def __init__(self, sandbox: Sandbox, meter: Meter) -> None:
        super().__init__(sandbox)
        self._meter = meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Returns one value as text."""
        for digits in re.findall(r"\d+", format_spec):
            width(self._meter, digits)
        self._meter.size(value)
        return self._meter.made(super().format_field(value, format_spec))


class _Generation(Extension):
    """The statement `{% generation %}`, with which templates mark the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """A stand-in for Jinja's global `dict`: Python's own type would be a way out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # Jinja's shows the contents, which may include itself


def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    meter: Meter = context.parent[METER]
    meter.size(value)
    if (len(indent) if isinstance(indent, str) else indent or 0) > _LARGEST_INDENT:
        raise LimitExceeded(f"it indents by more than {_LARGEST_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return str(meter.made(encoder.encode(value)))
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        meter.step()
        size += 56 + len(piece)
        meter.expect(size)
        pieces.append(piece)
    return str(meter.made("".join(pieces)))


def _strftime_now(form: str) -> str:
    if len(form) > _LARGEST_FORM or re.search(r"%\W*\d", form):
        raise LimitExceeded("it asks for a date of any width")
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
