"""Evaluation of a template's expressions. The scoping rules are Jinja's."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import new_context
from jinja2.utils import Namespace

from edgemoe.text.jinja.meter import Meter
from edgemoe.text.jinja.sandbox import METER, Sandbox

__all__ = ["EXPRESSIONS", "PARTS", "Expressions", "Scope"]

_MISSING = object()


class Scope:
    """The names of one scope, with a link to the scope around it.

    A loop's pass, a macro, a `with` and a captured block each have their own scope; an `if` has none.
    """

    __slots__ = ("_around", "_unset", "names")

    def __init__(self, around: Scope | None, unset: frozenset[str]) -> None:
        """Starts an empty scope; names in `unset` are undefined until they are set here."""
        self.names: dict[str, Any] = {}
        self._around, self._unset = around, unset

    def find(self, name: str, given: Mapping[str, Any], default: Any) -> Any:
        """Returns the value of a name: from this scope, a scope around it, or `given`, the caller's variables."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            if name in scope._unset:
                return default
            scope = scope._around
        return given.get(name, default)


class Expressions:
    """The evaluator of expressions in one rendering. One thread at a time."""

    def __init__(self, sandbox: Sandbox, meter: Meter, variables: Mapping[str, Any]) -> None:
        """Starts a rendering.

        Args:
            sandbox: the environment that parsed the template.
            meter: ends the rendering at a limit.
            variables: the variables that the template sees.
        """
        self._sandbox = sandbox
        self._meter = meter
        given = {**variables, METER: meter}
        self._context = new_context(sandbox, None, {}, given, globals=sandbox.globals)
        self.undefined = sandbox.undefined

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """Returns the value of an expression."""
        self._meter.step()
        return EXPRESSIONS[type(node)](self, node, scope)

    def _sized(self, node: nodes.Node, scope: Scope) -> Any:
        """Returns the value of an expression, metered by its size: for values that will be walked through."""
        value = self.value(node, scope)
        self._meter.size(value)
        return value

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        """Assigns a value to a name, to an attribute of a namespace, or to several names."""
        if isinstance(target, nodes.Name):
            scope.names[target.name] = value
        elif isinstance(target, nodes.NSRef):
            namespace = self._named(target.name, scope)
            if not isinstance(namespace, Namespace):
                raise jinja2.TemplateRuntimeError("cannot assign attribute on non-namespace object")
            namespace[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            values = list(value)
            if len(values) != len(target.items):
                raise ValueError(f"expected {len(target.items)} values, got {len(values)}")
            for part, one in zip(target.items, values, strict=True):
                self.assign(part, one, scope)

    def whole(self, pieces: list[str]) -> str:
        """Returns pieces of text joined into one."""
        self._meter.expect(sum(map(sys.getsizeof, pieces)))
        return str(self._meter.made("".join(pieces)))

    def _named(self, name: str, scope: Scope) -> Any:
        value = scope.find(name, self._context.parent, _MISSING)
        return self.undefined(name=name) if value is _MISSING else value

    def _name(self, node: nodes.Name, scope: Scope) -> Any:
        return self._named(node.name, scope)

    def _const(self, node: nodes.Const, scope: Scope) -> Any:
        return node.value

    def _data(self, node: nodes.TemplateData, scope: Scope) -> Any:
        return node.data

    def _tuple(self, node: nodes.Tuple, scope: Scope) -> Any:
        return self._meter.made(tuple(self.value(item, scope) for item in node.items))

    def _list(self, node: nodes.List, scope: Scope) -> Any:
        return self._meter.made([self.value(item, scope) for item in node.items])

    def _dict(self, node: nodes.Dict, scope: Scope) -> Any:
        pairs = {self._sized(pair.key, scope): self.value(pair.value, scope) for pair in node.items}
        return self._meter.made(pairs)

    def _conditional(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        if node.expr2 is not None:
            return self.value(node.expr2, scope)
        return self.undefined(
            f"the inline if-expression on line {node.lineno} evaluated to false and no else section was defined."
        )

    def _getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        return self._sandbox.getattr(self.value(node.node, scope), node.attr)

    def _getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            part = node.arg
            ends = [e and self.value(e, scope) for e in (part.start, part.stop, part.step)]
            cut = value[slice(*ends)]
            self._meter.spend(len(cut) * (8 if isinstance(cut, (list, tuple)) else 4) + 64)
            return cut
        return self._sandbox.getitem(value, self._sized(node.arg, scope))

    def _call(self, node: nodes.Call, scope: Scope) -> Any:
        return self._called(node, scope, {})

    def _called(self, node: nodes.Call, scope: Scope, further: Mapping[str, Any]) -> Any:
        function = self.value(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self._sandbox.call(self._context, function, *args, **kwargs, **further)

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(arg, scope) for arg in node.args or ()]
        kwargs = {str(pair.key): self.value(pair.value, scope) for pair in node.kwargs or ()}
        if node.dyn_args is not None:
            args += self._sized(node.dyn_args, scope)
        if node.dyn_kwargs is not None:
            kwargs |= self._sized(node.dyn_kwargs, scope)
        return args, kwargs

    def _filter(self, node: nodes.Filter, scope: Scope) -> Any:
        assert node.node is not None
        return self._filtered_value(node, scope, self.value(node.node, scope))

    def _through(self, node: nodes.Filter, scope: Scope, text: str) -> Any:
        """Returns a block's text after its filters; the innermost filter has no value of its own, and gets the text."""
        inner = node.node
        value = self._through(inner, scope, text) if isinstance(inner, nodes.Filter) else text
        return self._filtered_value(node, scope, value)

    def _filtered_value(self, node: nodes.Filter, scope: Scope, value: Any) -> Any:
        args, kwargs = self._arguments(node, scope)
        return self._sandbox.call_filter(node.name, value, args, kwargs, self._context)

    def _test(self, node: nodes.Test, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self._sandbox.call_test(node.name, value, args, kwargs, self._context)

    def _concat(self, node: nodes.Concat, scope: Scope) -> Any:
        return self.whole([str(self._sized(n, scope)) for n in node.nodes])

    def _compare(self, node: nodes.Compare, scope: Scope) -> Any:
        left = self._sized(node.expr, scope)
        result: Any = True
        for operand in node.ops:
            right = self._sized(operand.expr, scope)
            result = _COMPARE[operand.op](left, right)
            if not result:
                break
            left = right
        return result

    def _and(self, node: nodes.And, scope: Scope) -> Any:
        return self.value(node.left, scope) and self.value(node.right, scope)

    def _or(self, node: nodes.Or, scope: Scope) -> Any:
        return self.value(node.left, scope) or self.value(node.right, scope)

    def _not(self, node: nodes.Not, scope: Scope) -> Any:
        return not self.value(node.node, scope)

    def _sign(self, node: nodes.Neg | nodes.Pos, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        return -value if isinstance(node, nodes.Neg) else +value

    def _binary(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return self._sandbox.call_binop(self._context, node.operator, left, right)


EXPRESSIONS: Mapping[type[nodes.Node], Callable[[Expressions, Any, Scope], Any]] = {
    nodes.Name: Expressions._name, nodes.Const: Expressions._const, nodes.TemplateData: Expressions._data,
    nodes.Tuple: Expressions._tuple, nodes.List: Expressions._list, nodes.Dict: Expressions._dict,
    nodes.CondExpr: Expressions._conditional, nodes.Getattr: Expressions._getattr, nodes.Getitem: Expressions._getitem,
    nodes.Call: Expressions._call, nodes.Filter: Expressions._filter, nodes.Test: Expressions._test,
    nodes.Concat: Expressions._concat, nodes.Compare: Expressions._compare,
    nodes.And: Expressions._and, nodes.Or: Expressions._or, nodes.Not: Expressions._not,
    nodes.Neg: Expressions._sign, nodes.Pos: Expressions._sign,
    **dict.fromkeys(
        (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow), Expressions._binary
    ),
}  # fmt: skip

PARTS = (nodes.Pair, nodes.Keyword, nodes.Operand, nodes.Slice, nodes.NSRef)
"""Nodes that have no value of their own: the node that contains one reads it."""

_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge,
    "lt": operator.lt, "lteq": operator.le,
    "in": lambda one, many: one in many, "notin": lambda one, many: one not in many,
}  # fmt: skip
