"""Tool calls in Python's syntax, [get_weather(city="Paris", days=3)]: the python-call-list of transformers.

https://huggingface.co/docs/transformers/main/chat_response_parsing has the grammar: keyword arguments only, strings
with JSON's escapes, names with dots and hyphens, no trailing commas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["python_calls"]

_T = TypeVar("_T")

_TOKEN = re.compile(
    r"""(?P<text>'(?:[^'\\\n\r]|\\.)*'|"(?:[^"\\\n\r]|\\.)*")"""
    r"|(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*)"
    r"|(?P<mark>[][{}(),:=])"
    r"|(?P<end>\Z)",
    re.DOTALL,
)
_SPACE = re.compile(r"[ \t\n\r]*")
_CONSTANTS = {
    "True": True, "true": True, "False": False, "false": False, "None": None, "null": None
}  # fmt: skip
_MOST_DIGITS, _MOST_INTEGER = 17, 2**53 - 1
_MOST_DEPTH = 100


def python_calls(text: str) -> list[dict[str, Any]]:
    """Returns the calls of a list, each as {"name": ..., "arguments": {...}}.

    Raises:
        ValueError: the text is no such list; says where.
    """
    reader = _Reader(text)
    reader.expect("[")
    found = reader.items("]", reader.call)
    reader.take("end")
    return found


class _Reader:
    """A recursive-descent parser over the tokens of a text."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._next()

    def _next(self) -> None:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space is not None else self._at
        token = _TOKEN.match(self._text, self._at)
        if token is None:
            raise ValueError(f"no word of a call at {self._at}")
        self._kind, self._word, self._at = str(token.lastgroup), token[0], token.end()

    def take(self, kind: str) -> str:
        """Returns the next token, which must be of a kind, and moves past it."""
        if self._kind != kind:
            raise ValueError(f"expected a {kind} before {self._at}")
        word = self._word
        if kind != "end":
            self._next()
        return word

    def expect(self, mark: str) -> None:
        """Moves past the next token, which must be a mark."""
        if self._word != mark:
            raise ValueError(f"expected {mark!r} before {self._at}")
        self._next()

    def items(self, last: str, item: Callable[[], _T]) -> list[_T]:
        """Returns items that commas separate, and moves past the mark that ends them."""
        out: list[_T] = []
        while self._word != last:
            if out:
                self.expect(",")
            out.append(item())
        self._next()
        return out

    def call(self) -> dict[str, Any]:
        name = self.take("name")
        self.expect("(")
        return {"name": name, "arguments": _unique(self.items(")", self._argument))}

    def _argument(self) -> tuple[str, Any]:
        name = self.take("name")
        self.expect("=")
        return name, self._value(0)

    def _pair(self, depth: int) -> tuple[str, Any]:
        key = _unescaped(self.take("text"))
        self.expect(":")
        return key, self._value(depth)

    def _value(self, depth: int) -> Any:
        """Reads a value that is nested in `depth` others."""
        if self._word in ("[", "{"):
            if depth >= _MOST_DEPTH:
                raise ValueError(f"more than {_MOST_DEPTH} levels")
            is_list = self._word == "["
            self._next()
            if is_list:
                return self.items("]", lambda: self._value(depth + 1))
            return _unique(self.items("}", lambda: self._pair(depth + 1)))
        if self._kind == "text":
            return _unescaped(self.take("text"))
        if self._kind == "number":
            return _number(self.take("number"))
        name = self.take("name")
        if name not in _CONSTANTS:
            raise ValueError(f"expected a value, got {name!r}")
        return _CONSTANTS[name]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name twice")
    return out


def _number(word: str) -> int | float:
    if word.lstrip("-").isdigit():
        if len(word) > _MOST_DIGITS or abs(int(word)) > _MOST_INTEGER:
            raise ValueError("an integer that JSON's readers do not hold")
        return int(word)
    value = float(word)
    if abs(value) == float("inf"):
        raise ValueError("a number that is too large")
    return value


def _unescaped(quoted: str) -> str:
    """Returns a string without its quotes. Its escapes are JSON's, and \\'."""
    body = re.sub(r'\\.|"', _as_json, quoted[1:-1], flags=re.DOTALL)
    text: str = json.loads(f'"{body}"', strict=False)
    text.encode()  # raises a ValueError at half of a surrogate pair
    return text


def _as_json(match: re.Match[str]) -> str:
    return {'"': '\\"', "\\'": "'"}.get(match[0], match[0])
