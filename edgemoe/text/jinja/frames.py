"""Which names of a template are undefined before they are set, even if the caller gives them a value.

In Jinja, a name belongs to a part of a template (the whole, a loop's body, a macro, a captured block) if its first use
in that part is a `set`. Parts inside it that run before the `set` find the name undefined, not the caller's value. An
`if` is not a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from jinja2 import nodes

__all__ = ["unset_names"]

_INNER = (
    nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Scope, nodes.AssignBlock,
)  # fmt: skip
"""Statements that have names of their own."""


def unset_names(template: nodes.Template) -> Mapping[int, frozenset[str]]:
    """Returns, for each part of a template, the names that are undefined until they are set there.

    Keys are the ids of the parts' nodes. A loop has three parts: its body, under the loop's own id, its `else` and its
    test. The rules are those of `jinja2.idtracking`, whose time grows with the square of a template's length.
    """
    found: dict[int, frozenset[str]] = {}
    waiting: list[tuple[int, Iterable[nodes.Node], _Frame | None]] = [
        (id(template), template.body, None)
    ]
    while waiting:
        key, parts, around = waiting.pop()
        frame = _Frame(around)
        frame.look(parts, is_certain=True)
        found[key] = frozenset(frame.unset)
        waiting += [(*part, frame) for node in frame.inner for part in _parts(node)]
    return found


def _parts(node: nodes.Node) -> Iterator[tuple[int, Sequence[nodes.Node]]]:
    """Yields the parts of a statement, each as its key and its nodes, in the order in which its names occur."""
    if isinstance(node, nodes.For):
        yield id(node), [node.target, *node.body]
        if node.else_:
            yield id(node.else_), node.else_
        if node.test is not None:
            yield id(node.test), [node.target, node.test]
    elif isinstance(node, nodes.AssignBlock):
        yield id(node), node.body
    elif isinstance(node, nodes.With):
        yield id(node), [*node.targets, *node.body]
    elif isinstance(node, nodes.CallBlock):
        yield id(node), list(node.iter_child_nodes(exclude=("call",)))
    else:
        yield id(node), list(node.iter_child_nodes())


class _Frame:
    """A part of a template, which has names of its own."""

    def __init__(self, around: _Frame | None) -> None:
        self._around = around
        self.known: set[str] = set()
        self.unset: set[str] = set()
        self.inner: list[nodes.Node] = []

    def _is_known(self, name: str) -> bool:
        frame: _Frame | None = self
        while frame is not None:
            if name in frame.known:
                return True
            frame = frame._around
        return False

    def look(self, parts: Iterable[nodes.Node], *, is_certain: bool) -> None:
        """Visits statements and expressions in their order; those within an `if` are not certain to run."""
        for node in parts:
            if isinstance(node, nodes.If):
                self.look([node.test], is_certain=is_certain)
                self.look([*node.body, *node.elif_, *node.else_], is_certain=False)
            elif isinstance(node, _INNER):
                self._pass(node, is_certain=is_certain)
            elif isinstance(node, nodes.Assign):
                self.look([node.node, node.target], is_certain=is_certain)
            elif isinstance(node, nodes.Name) and node.ctx == "store":
                self._set(node.name, is_certain=is_certain)
            elif isinstance(node, (nodes.Name, nodes.NSRef)):
                self.known.add(node.name)
            else:
                self.look(node.iter_child_nodes(), is_certain=is_certain)

    def _pass(self, node: nodes.Node, *, is_certain: bool) -> None:
        """Visits what a statement with its own names evaluates or sets outside of these, in this part."""
        self.inner.append(node)
        if isinstance(node, nodes.For):
            self.look([node.iter], is_certain=is_certain)
        elif isinstance(node, nodes.Macro):
            self._set(node.name, is_certain=is_certain)
        elif isinstance(node, nodes.CallBlock):
            self.look([node.call], is_certain=is_certain)
        elif isinstance(node, nodes.FilterBlock):
            self.look([node.filter], is_certain=is_certain)
        elif isinstance(node, nodes.With):
            self.look(node.values, is_certain=is_certain)
        elif isinstance(node, nodes.AssignBlock):
            self.look([node.target], is_certain=is_certain)

    def _set(self, name: str, *, is_certain: bool) -> None:
        if is_certain and not self._is_known(name):
            self.unset.add(name)
        self.known.add(name)
