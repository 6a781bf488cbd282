"""An interpreter of parsed Jinja templates: it runs them node by node, so that every step and value can be metered.

Jinja's own compiler turns a template into Python code. It evaluates constants while compiling, takes 10 s and 800 MiB
for a template of 256 KiB, and leaves slices, comparisons, string concatenation and loops to Python, unmetered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Undefined

from edgemoe.text.jinja.expressions import EXPRESSIONS, PARTS, Expressions, Scope
from edgemoe.text.jinja.frames import unset_names
from edgemoe.text.jinja.meter import Meter
from edgemoe.text.jinja.sandbox import Sandbox

__all__ = ["Program"]

_Flow = Literal["break", "continue"] | None
"""How a list of statements ended, where a loop must react to it."""


class Program:
    """A template that is ready to run. Immutable."""

    def __init__(self, template: nodes.Template) -> None:
        """Checks a parsed template.

        Raises:
            TemplateSyntaxError: a statement is not supported, as it is for several templates or for web pages; names it
                and its line.
        """
        self.template, self.unset = template, unset_names(template)
        self.special: dict[int, frozenset[str]] = {}
        """For each macro, by its node's id, which of the names varargs, kwargs and caller it uses."""
        known = {*_STATEMENTS, *EXPRESSIONS, *PARTS}
        for node in template.find_all(nodes.Node):
            if type(node) not in known:
                name = type(node).__name__.lower()
                raise jinja2.TemplateSyntaxError(f"{name} is not supported", node.lineno or 1)
            if isinstance(node, (nodes.Macro, nodes.CallBlock)):
                used = {n.name for part in node.body for n in _names(part)}
                own = {arg.name for arg in node.args}
                self.special[id(node)] = frozenset(used & {"varargs", "kwargs", "caller"} - own)

    def run(self, sandbox: Sandbox, variables: Mapping[str, Any], meter: Meter) -> Iterator[str]:
        """Yields the text, piece by piece.

        Args:
            sandbox: the environment that parsed the template.
            variables: the variables that the template sees.
            meter: ends the run at a limit.
        """
        run = _Run(self, sandbox, meter, variables)
        scope = Scope(None, self.unset[id(self.template)])
        for statement in self.template.body:
            out: list[str] = []
            run.body([statement], scope, out)
            yield from out


class _Macro:
    """A macro, or the body of a `call` block. Its names are looked up in the scope where it is defined."""

    def __init__(
        self, run: _Run, node: nodes.Macro | nodes.CallBlock, name: str | None, scope: Scope
    ) -> None:
        self.name = name
        self.arguments = tuple(arg.name for arg in node.args)
        self._run = run
        self._node = node
        self._scope = scope
        self._special = run.program.special[id(node)]

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        names, most = self.arguments, len(self.arguments)
        scope = self._run.scope(self._node, self._scope)
        given = dict(zip(names, args, strict=False))
        given |= {n: kwargs.pop(n) for n in names[len(args) :] if n in kwargs}
        if "caller" in self._special:
            none = self._run.undefined("No caller defined", name="caller")
            scope.names["caller"] = kwargs.pop("caller", none)
        if "kwargs" in self._special:
            scope.names["kwargs"] = kwargs
        elif kwargs:
            raise TypeError(f"macro {self.name!r} takes no keyword argument {next(iter(kwargs))!r}")
        if "varargs" in self._special:
            scope.names["varargs"] = args[most:]
        elif len(args) > most:
            raise TypeError(f"macro {self.name!r} takes not more than {most} argument(s)")
        defaults = dict(
            zip(names[most - len(self._node.defaults) :], self._node.defaults, strict=True)
        )
        for name in names:
            if name in given:
                scope.names[name] = given[name]
            elif name in defaults:
                scope.names[name] = self._run.value(defaults[name], scope)
            else:
                scope.names[name] = self._run.undefined(
                    f"parameter {name!r} was not provided", name=name
                )
        return self._run.text(self._node.body, scope)

    def __repr__(self) -> str:
        return f"<Macro {'anonymous' if self.name is None else repr(self.name)}>"


class _Run(Expressions):
    """One rendering of a template."""

    def __init__(
        self, program: Program, sandbox: Sandbox, meter: Meter, variables: Mapping[str, Any]
    ) -> None:
        super().__init__(sandbox, meter, variables)
        self.program = program

    def scope(self, part: object, around: Scope) -> Scope:
        """Returns a new scope for a part of the template; see `unset_names`."""
        return Scope(around, self.program.unset[id(part)])

    def body(self, statements: Sequence[nodes.Node], scope: Scope, out: list[str]) -> _Flow:
        """Runs statements; what they write is appended to `out`."""
        for node in statements:
            self._meter.step()
            flow = _STATEMENTS[type(node)](self, node, scope, out)
            if flow is not None:
                return flow
        return None

    def text(self, statements: Sequence[nodes.Node], scope: Scope) -> str:
        """Runs statements and returns what they write."""
        out: list[str] = []
        self.body(statements, scope, out)
        return self.whole(out)

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> _Flow:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                self._write(part.data, out)
            else:
                self._write(self.value(part, scope), out)
        return None

    def _write(self, value: Any, out: list[str]) -> None:
        self._meter.size(value)
        out.append(str(self._meter.made(str(value))))

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> _Flow:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self.body(branch.body, scope, out)
        return self.body(node.else_, scope, out)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> _Flow:
        iterable = self.value(node.iter, scope)
        if node.recursive:
            self._write(self._loop_text(node, scope, iterable, 0), out)
        else:
            self._loop(node, scope, out, LoopContext(self._kept(node, scope, iterable), Undefined))
        return None

    def _loop_text(self, node: nodes.For, scope: Scope, iterable: Any, depth: int) -> str:
        """Returns what one level of a recursive loop writes."""

        def deeper(inner: Any, _: object, depth: int = 0) -> str:
            return self._loop_text(node, scope, inner, depth)

        out: list[str] = []
        kept = self._kept(node, scope, iterable)
        self._loop(node, scope, out, LoopContext(kept, Undefined, deeper, depth))  # type: ignore[arg-type]
        return self.whole(out)

    def _loop(self, node: nodes.For, scope: Scope, out: list[str], loop: LoopContext) -> None:
        is_first = True  # until a pass reaches its end; if none does, Jinja runs `else`
        for item, _ in loop:
            self._meter.step()
            inner = self.scope(node, scope)
            inner.names["loop"] = loop
            self.assign(node.target, item, inner)
            flow = self.body(node.body, inner, out)
            if flow == "break":
                break
            is_first = is_first and flow == "continue"
        if is_first and node.else_:
            self.body(node.else_, self.scope(node.else_, scope), out)

    def _kept(self, node: nodes.For, scope: Scope, iterable: Any) -> Iterable[Any]:
        """Returns the items of a loop: all, or those that its `if` keeps."""
        return iterable if node.test is None else self._filtered(node, scope, iterable)

    def _filtered(self, node: nodes.For, scope: Scope, iterable: Any) -> Iterator[Any]:
        assert node.test is not None
        for item in iterable:
            inner = self.scope(node.test, scope)
            self.assign(node.target, item, inner)
            if self.value(node.test, inner):
                yield item

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> _Flow:
        scope.names[node.name] = _Macro(self, node, node.name, scope)
        return None

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> _Flow:
        caller = _Macro(self, node, None, scope)
        self._write(self._called(node.call, scope, {"caller": caller}), out)
        return None

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> _Flow:
        text = self.text(node.body, self.scope(node, scope))
        self._write(self._through(node.filter, scope, text), out)
        return None

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> _Flow:
        inner = self.scope(node, scope)
        for target, value in zip(node.targets, node.values, strict=True):
            self.assign(target, self.value(value, scope), inner)
        return self.body(node.body, inner, out)

    def _scope(self, node: nodes.Scope, scope: Scope, out: list[str]) -> _Flow:
        return self.body(node.body, self.scope(node, scope), out)

    def _set(self, node: nodes.Assign, scope: Scope, out: list[str]) -> _Flow:
        self.assign(node.target, self.value(node.node, scope), scope)
        return None

    def _set_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> _Flow:
        value: Any = self.text(node.body, self.scope(node, scope))
        if node.filter is not None:
            value = self._through(node.filter, scope, value)
        self.assign(node.target, value, scope)
        return None


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)


_STATEMENTS: Mapping[type[nodes.Node], Callable[[_Run, Any, Scope, list[str]], _Flow]] = {
    nodes.Output: _Run._output, nodes.If: _Run._if, nodes.For: _Run._for, nodes.Macro: _Run._macro,
    nodes.CallBlock: _Run._call_block, nodes.FilterBlock: _Run._filter_block, nodes.With: _Run._with,
    nodes.Scope: _Run._scope, nodes.Assign: _Run._set, nodes.AssignBlock: _Run._set_block,
    nodes.Break: lambda *_: "break", nodes.Continue: lambda *_: "continue",
}  # fmt: skip
