"""`response_template` in a model's tokenizer_config.json: how its replies are parsed, as transformers defines it.

A template names the fields of a message, and the words or patterns that open and close each field in the text. Text
outside these belongs to the one field without an opening.
https://huggingface.co/docs/transformers/main/chat_response_parsing

Patterns come with the model file and are not trusted: each search has a time limit, and after the first one that
reaches it the template is not followed any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import FormatError, quoted
from edgemoe.text import fields as contents
from edgemoe.text.replies import Event, Piece, Schemas, joined

__all__ = ["ResponseTemplate", "TemplateParser"]

_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_FIELD_KEYS = {
    "open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional",
    "transform", "transform_each",
}  # fmt: skip
_LONGEST = 64 << 10  # characters of a template
_SEARCH_S = 0.1  # limit of one search
_REASONING, _CALLS = ("reasoning_content", "reasoning", "thinking"), "tool_calls"


@dataclass(frozen=True, slots=True)
class _Anchor:
    """What opens or closes a field: a pattern, or words."""

    pattern: Any
    """A compiled `regex` pattern; that of `words` where there are any."""
    words: tuple[str, ...]
    """The words that the template gives instead of a pattern."""

    @property
    def can_grow(self) -> bool:
        """Whether a match at the end of the text so far may become a different one when more text comes."""
        return not self.words or any(
            a != b and a.startswith(b) for a in self.words for b in self.words
        )


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    opens: _Anchor | None
    closes: _Anchor | None
    content: str
    args: Mapping[str, Any]
    transform: Any
    each: bool

    @property
    def is_text(self) -> bool:
        """Whether the field's text is passed on as it comes."""
        return self.name != _CALLS and self.content == "text" and self.transform is None

    @property
    def kind(self) -> str:
        return "reasoning" if self.name in _REASONING else "content"


class ResponseTemplate:
    """A response template that has been checked. Immutable."""

    def __init__(self, spec: object) -> None:
        """Reads a template.

        Raises:
            FormatError: it is not a valid template; says what is wrong.
            ImportError: the package regex is not installed.
        """
        if not isinstance(spec, dict) or len(json.dumps(spec)) > _LONGEST:
            raise FormatError("response_template: expected an object of at most 64 Ki characters")
        if unknown := spec.keys() - _KEYS:
            raise FormatError(f"response_template: unknown {quoted(sorted(unknown)[0])}")
        if spec.get("version", 1) != 1:
            raise FormatError(f"response_template: version {quoted(spec['version'])} is unknown")
        fields = spec.get("fields")
        if not isinstance(fields, dict) or not fields:
            raise FormatError("response_template: fields: expected an object")
        self.fields = tuple(_field(name, value) for name, value in fields.items())
        rest = [field for field in self.fields if field.opens is None]
        if len(rest) > 1:
            raise FormatError("response_template: more than one field has no opening")
        self.rest = rest[0] if rest else None
        start = _anchor("response_template", spec, "start_anchor")
        if start is None:
            raise FormatError("response_template: expected start_anchor or start_anchor_pattern")
        self._start = start
        self._text = json.dumps(spec, ensure_ascii=False).replace("\\", "")

    @property
    def reasons(self) -> bool:
        """Whether the template has a field for reasoning."""
        return any(field.kind == "reasoning" for field in self.fields)

    def speaks_of(self, word: str) -> bool:
        """Returns whether a word occurs in the template, so that a parser must get it as text."""
        return word.replace("\\", "") in self._text

    def after_start(self, prompt: str) -> str:
        """Returns the end of a prompt that already belongs to the reply: what follows the last start anchor."""
        end = 0
        for match in self._start.pattern.finditer(prompt, timeout=_SEARCH_S):
            end = match.end()
        return prompt[end:] if end else ""


def _field(name: str, spec: object) -> _Field:
    where = f"response_template: {name[:40]}"
    if not isinstance(spec, dict):
        raise FormatError(f"{where}: expected an object")
    if unknown := spec.keys() - _FIELD_KEYS:
        raise FormatError(f"{where}: unknown {quoted(sorted(unknown)[0])}")
    content, args = spec.get("content", "text"), spec.get("content_args", {})
    if content not in contents.READERS or not isinstance(args, dict):
        raise FormatError(f"{where}: content {quoted(content)} is unknown")
    opens, closes = _anchor(where, spec, "open"), _anchor(where, spec, "close")
    return _Field(
        name, opens, closes, content, args, spec.get("transform"), bool(spec.get("transform_each"))
    )


def _anchor(where: str, spec: Mapping[str, Any], key: str) -> _Anchor | None:
    import regex

    words, pattern = spec.get(key), spec.get(f"{key}_pattern")
    if words is not None and pattern is not None:
        raise FormatError(f"{where}: {key} and {key}_pattern")
    if pattern is not None:
        try:
            return _Anchor(regex.compile(pattern, regex.DOTALL), ())
        except (regex.error, TypeError, RecursionError) as error:
            raise FormatError(f"{where}: {key}_pattern: {quoted(error)}") from None
    if words is None:
        return None
    listed = words if isinstance(words, list) else [words]
    if not listed or not all(isinstance(w, str) and w for w in listed):
        raise FormatError(f"{where}: {key}: expected text, or a list of it")
    found = tuple(dict.fromkeys(listed))
    ordered = sorted(found, key=len, reverse=True)
    return _Anchor(regex.compile("|".join(map(regex.escape, ordered))), found)


class TemplateParser:
    """A parser of one reply by its model's response template; like `ReplyParser`. One thread at a time."""

    def __init__(self, template: ResponseTemplate, schemas: Schemas | None, prompt: str) -> None:
        """Starts a reply.

        Args:
            template: the model's response template.
            schemas: the schemas of the tools that may be called; None for no tools: what looks like a call is text.
            prompt: the prompt that the reply follows; it may contain the beginning of the reply.
        """
        self._template, self._schemas = template, schemas
        self._field, self._opener = template.rest, ""
        self._captures: dict[str, str] = {}
        self._text = self._body = self._spaces = ""
        self._is_fresh, self._is_broken = False, False
        self.calls = 0
        try:
            self.push(template.after_start(prompt))
        except TimeoutError:
            self._is_broken = True
        self._body, self._spaces, self._is_fresh = "", "", True

    @property
    def state(self) -> str:
        """What the next text will belong to: "content", "reasoning" or "call"."""
        if self._field is None or self._field is self._template.rest:
            return "content"
        return "call" if self._field.name == _CALLS else self._field.kind

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns the events that are certain by now."""
        self._text += text
        out: list[Event] = []
        self._go_on(out, is_last=False)
        return joined(out)

    def flush(self) -> list[Event]:
        """Ends the reply and returns the last events."""
        out: list[Event] = []
        self._go_on(out, is_last=True)
        self._close(out, "")
        return joined(out)

    def _go_on(self, out: list[Event], *, is_last: bool) -> None:
        while not self._is_broken:
            try:
                found, hold = self._next(is_last=is_last)
            except TimeoutError:
                self._is_broken = True
                break
            if found is None:
                self._take(out, self._text[:hold])
                self._text = self._text[hold:]
                break
            field, match = found
            self._take(out, self._text[: match.start()])
            self._text, word = self._text[match.end() :], match[0]
            captures = {k: v for k, v in match.groupdict().items() if v is not None}
            if field is None:
                self._captures |= captures
                self._close(out, word)
                if not word:
                    break
            else:
                self._close(out, "")
                self._field, self._opener, self._captures = field, word, captures
                self._is_fresh = True
        if self._is_broken:
            self._take(out, self._text)
            self._text = ""

    def _next(self, *, is_last: bool) -> tuple[tuple[_Field | None, Any] | None, int]:
        """Returns the first anchor in the text, and the offset from which on text is held back.

        The anchor is a field that it opens, or None for the close of the present field, and the match. There is no
        anchor (None) until it is certain.
        """
        template = self._template
        watched: list[tuple[_Field | None, _Anchor]] = []
        if self._field is template.rest:
            fields = [f for f in template.fields if f.name != _CALLS or self._schemas is not None]
            watched = [(f, f.opens) for f in fields if f.opens is not None]
        if self._field is not None and self._field.closes is not None:
            watched.append((None, self._field.closes))
        best: tuple[Any, tuple[_Field | None, Any]] | None = None
        hold, text = len(self._text), self._text
        for field, anchor in watched:
            match = anchor.pattern.search(text, partial=not is_last, timeout=_SEARCH_S)
            if match is None:
                continue
            if not is_last and (match.partial or self._may_change(anchor, match)):
                hold = min(hold, match.start())
                continue
            key = (match.start(), -len(match[0]), field is None)
            if best is None or key < best[0]:
                best = (key, (field, match))
        # A match that is not certain yet begins earlier, and would come first.
        if best is None or (best[1][1].start() >= hold and not is_last):
            return None, hold
        return best[1], hold

    def _may_change(self, anchor: _Anchor, match: Any) -> bool:
        """Returns whether a match may be a different one when more text has come."""
        if match.end() == len(self._text):
            return match.start() == match.end() or anchor.can_grow
        if anchor.words:
            return False
        again = anchor.pattern.match(self._text + "\0", match.start(), timeout=_SEARCH_S)
        return (
            again is None or again.span() != match.span() or again.groupdict() != match.groupdict()
        )

    def _take(self, out: list[Event], text: str) -> None:
        """Takes text of the present field."""
        field = self._field
        if not text or field is None:
            return
        if not field.is_text:
            self._body += text
            return
        if field.args.get("strip", True):
            text = text.lstrip() if self._is_fresh else text
            text, kept = self._spaces + text, text.rstrip()
            self._spaces = text[len(self._spaces) + len(kept) :] if kept else text
            text = text[: len(text) - len(self._spaces)] if kept else ""
        if text:
            self._is_fresh = False
            out.append(Piece(field.kind, text))  # type: ignore[arg-type]

    def _close(self, out: list[Event], word: str) -> None:
        """Ends the present field."""
        field = self._field
        if (
            field is not None
            and not field.is_text
            and (self._body or field is not self._template.rest)
        ):
            out.extend(self._read(field, word))
        self._field, self._body, self._opener, self._spaces = self._template.rest, "", "", ""
        self._captures, self._is_fresh = {}, True

    def _read(self, field: _Field, word: str) -> list[Event]:
        """Reads a field that has to be read as a whole; what cannot be read is text."""
        as_text = Piece("content", self._opener + self._body + word)
        try:
            value = contents.READERS[field.content](self._body, field.args)
            value = contents.transformed(field.transform, value, self._captures, each=field.each)
        except (ValueError, KeyError, TypeError, RecursionError, TimeoutError):
            return [as_text]
        if field.name != _CALLS:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            return [Piece(field.kind, text)] if text else []  # type: ignore[arg-type]
        found = [
            contents.call_of(v, self._schemas or {}) for v in (value if field.each else [value])
        ]
        calls = [call for call in found if call is not None]
        if not calls or len(calls) < len(found):
            return [as_text]
        self.calls += len(calls)
        return [*calls]
