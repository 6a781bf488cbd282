"""Readers for the contents of a `response_template`'s fields: the parsers that transformers defines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from edgemoe.text.calls import ToolCall
from edgemoe.text.python_calls import python_calls

__all__ = ["READERS", "call_of", "transformed"]

Args = Mapping[str, Any]

_PATTERN_S = 0.1
_PLACE = re.compile(r"\{(\w+(?:\.\w+)*)\}")


def _text(text: str, args: Args) -> str:
    return text.strip() if args.get("strip", True) else text


def _bool(text: str, args: Args) -> bool:
    return _text(text, args).lower() in ("true", "1")


def _json(text: str, args: Args) -> Any:
    """Reads JSON; `args` may allow keys without quotes, and strings between other marks."""
    texts: list[str] = []
    work = text
    for first, last in args.get("string_delims", ()):
        if "\x01" in text:
            raise ValueError("a control character")

        def keep(match: re.Match[str]) -> str:
            texts.append(match[1])
            return f"\x01{len(texts) - 1}\x01"

        work = re.sub(re.escape(first) + "(.*?)" + re.escape(last), keep, work, flags=re.S)
    if args.get("unquoted_keys"):
        work = re.sub(
            r'"(?:\\.|[^"\\])*"|(?<=[{,])(\s*)(\w+)(\s*):',
            lambda m: m[0] if m[2] is None else f'{m[1]}"{m[2]}"{m[3]}:', work,
        )  # fmt: skip
    work = re.sub("\x01(\\d+)\x01", lambda m: json.dumps(texts[int(m[1])]), work)
    try:
        return json.loads(work)
    except ValueError:
        if args.get("allow_non_json"):
            return _text(text, args)
        raise


def _inner(text: str, reader: object) -> Any:
    if not isinstance(reader, Mapping):
        return text
    return READERS[reader.get("name", "text")](text, reader.get("args", {}))


def _tags(text: str, args: Args) -> dict[str, Any]:
    """Reads pairs: the groups key and value of each match of a pattern."""
    import regex

    try:
        pattern = regex.compile(args["tag_pattern"], regex.DOTALL)
    except regex.error as error:
        raise ValueError(str(error)) from None
    out: dict[str, Any] = {}
    lists: set[str] = set()
    for match in pattern.finditer(text, timeout=_PATTERN_S):
        groups = match.groupdict()
        key, value = groups["key"], _inner(groups.get("value") or "", args.get("value_parser"))
        if key in out and args.get("merge_duplicates"):
            out[key] = [*(out[key] if key in lists else [out[key]]), value]
            lists.add(key)
        else:
            out[key] = value
    return out


def _lines(text: str, args: Args) -> dict[str, Any]:
    """Reads one pair per line."""
    out, between = {}, args.get("kv_sep", ":")
    for line in text.split(args.get("line_sep", "\n")):
        key, found, value = _text(line, args).partition(between)
        if found:
            out[_text(key, args)] = _inner(_text(value, args), args.get("value_parser"))
    return out


READERS: Mapping[str, Callable[[str, Args], Any]] = {
    "text": _text, "int": lambda t, a: int(_text(t, a)), "float": lambda t, a: float(_text(t, a)), "bool": _bool,
    "json": _json, "xml-inline": _tags, "kv-lines": _lines, "python-call-list": lambda t, a: python_calls(t),
}  # fmt: skip
"""The readers by the name of the parser. They raise ValueError, KeyError, TypeError or TimeoutError."""


def transformed(form: object, value: Any, captures: Mapping[str, str], *, each: bool) -> Any:
    """Returns a value that was read, put into the form of the message; unchanged where the form is None.

    Args:
        form: the field's `transform`: JSON in which "{name}" stands for a value.
        value: what was read; its name in the form is content.
        captures: named groups of the patterns around the field.
        each: apply the form to every item of `value`, whose keys are names then.

    Raises:
        KeyError, ValueError, TypeError: the form names a value that does not exist.
    """
    if form is None:
        return value
    if each:
        return [_formed(form, {**captures, **item}) for item in value]
    return _formed(form, {**captures, "content": value})


def _formed(form: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(form, dict):
        return {k: _formed(v, names) for k, v in form.items()}
    if isinstance(form, list):
        return [_formed(v, names) for v in form]
    match = _PLACE.fullmatch(form) if isinstance(form, str) else None
    if match is None:
        return form
    value: Any = names
    for key in match[1].split("."):
        value = value[key]
    return value


def call_of(value: object, schemas: Mapping[str, Any]) -> ToolCall | None:
    """Returns a message's call, None if it is none. Arguments that are text are converted to the schema's types."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    schema = schemas.get(name)
    known = schema.get("properties") if isinstance(schema, dict) else None
    if isinstance(known, dict):
        arguments = {k: _cast(v, known.get(k)) for k, v in arguments.items()}
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _cast(value: Any, schema: object) -> Any:
    """Returns a text as a value of the first of a schema's types that it fits; any other value unchanged."""
    types = _types(schema)
    if isinstance(value, list) and types and "array" not in types:
        return [_cast(item, schema) for item in value]
    if not isinstance(value, str):
        return value
    for kind in types:
        try:
            if kind in ("integer", "number"):
                number = float(value)
                is_whole = number.is_integer() and (kind == "integer" or "." not in value)
                if abs(number) < float("inf") and (is_whole or kind == "number"):
                    return int(number) if is_whole else number
            elif kind == "boolean" and value.strip().lower() in ("true", "1", "false", "0"):
                return value.strip().lower() in ("true", "1")
            elif kind == "null" and value.strip() in ("null", "None"):
                return None
            elif kind in ("object", "array"):
                found = json.loads(value)
                if isinstance(found, dict if kind == "object" else list):
                    return found
        except (ValueError, RecursionError):
            continue
    return value


def _types(schema: object) -> list[str]:
    if not isinstance(schema, dict):
        return []
    said = schema.get("type")
    types = [t for t in ([said] if isinstance(said, str) else said or ()) if isinstance(t, str)]
    for name in ("anyOf", "oneOf"):
        for choice in schema.get(name) or ():
            types += _types(choice)
    return [*types, "null"] if schema.get("nullable") and "null" not in types else types
