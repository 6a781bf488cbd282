"""Readers of tool calls, as models write them. No reader raises an error: it returns None for what is no call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.text.python_calls import python_calls

__all__ = [
    "CHANNEL_MARKS", "GEMMA_QUOTE", "ToolCall", "channel", "deepseek", "gemma", "in_channel", "json_calls", "kimi",
    "markers", "mistral", "pythonic", "recipient", "tagged",
]  # fmt: skip

CHANNEL_MARKS = (
    "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|constrain|>",
)  # fmt: skip

GEMMA_QUOTE = '<|"|>'

Schemas = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: str
    """A JSON object; verbatim, where the model wrote one."""


_MARK = re.compile(r"<[^<>\s]*>|\[[A-Z_]+\]")


def markers(text: str) -> list[str]:
    """Returns the markers in the text of a call, such as <tool_call>, each of which may be a special token."""
    return _MARK.findall(text)


def _object(text: str) -> str | None:
    """Returns the text if it is a JSON object, else None."""
    try:
        return text.strip() if isinstance(json.loads(text), dict) else None
    except (ValueError, RecursionError):
        return None


def _call(value: object) -> ToolCall | None:
    """Reads an object with "name" and "arguments" (or "parameters")."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return None if _object(arguments) is None else ToolCall(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def json_calls(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads one JSON object, or a list of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [_call(item) for item in (value if isinstance(value, list) else [value])]
    whole = [call for call in found if call is not None]
    return whole if whole and len(whole) == len(found) else None


def mistral(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads Mistral's calls: a list of objects, or name[ARGS]{...} one or more times, each after [TOOL_CALLS]."""
    if (found := json_calls(text, schemas)) is not None:
        return found
    calls = []
    for part in text.split("[TOOL_CALLS]"):
        match = re.fullmatch(
            r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", part, re.S
        )
        if match is None or (arguments := _object(match[2])) is None:
            return None
        calls.append(ToolCall(match[1], arguments))
    return calls


def pythonic(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads LFM2's list of calls in Python's syntax, or its list of JSON objects."""
    try:
        found = [_call(value) for value in python_calls(text)]
    except (ValueError, RecursionError):
        return json_calls(text, schemas)
    return [call for call in found if call is not None] or None


def tagged(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads the inside of <tool_call>: an object (Qwen, Hermes), <function=name> (Qwen3-Coder), or GLM's <arg_key>."""
    text = text.strip()
    if text.startswith(("{", "[")):
        return json_calls(text, schemas)
    if match := re.fullmatch(r"<function=([^>\n]+)>(.*?)(?:</function>)?", text, re.S):
        name, pattern = match[1].strip(), r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"
        return [_from_text(name, re.findall(pattern, match[2], re.S), schemas)]
    name, _, rest = text.partition("<arg_key>")
    pairs = re.findall(
        r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", f"<arg_key>{rest}", re.S
    )
    if re.fullmatch(r"[\w.-]+", name.strip()) and (pairs or not rest):
        return [_from_text(name.strip(), pairs, schemas)]
    return None


def _from_text(name: str, pairs: list[tuple[str, str]], schemas: Schemas) -> ToolCall:
    """Returns a call whose values have no quotes: text where the tool's schema says so, else JSON if it parses."""
    schema = schemas.get(name)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    arguments: dict[str, Any] = {}
    for key, text in pairs:
        known = properties.get(key) if isinstance(properties, dict) else None
        is_text = isinstance(known, dict) and known.get("type") == "string"
        try:
            arguments[key] = text if is_text else json.loads(text)
        except (ValueError, RecursionError):
            arguments[key] = text
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def deepseek(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads DeepSeek's calls: V3 and R1 with a type and a block of code, V3.1 without."""
    calls = []
    for part in re.findall(r"<｜tool▁call▁begin｜>(.*?)(?:<｜tool▁call▁end｜>|$)", text, re.S):
        head, found, rest = part.partition("<｜tool▁sep｜>")
        if not found:
            return None
        name, arguments = head.strip(), rest
        if match := re.fullmatch(r"\s*([\w.-]+)\s*```(?:json)?\s*(.*?)\s*(?:```)?\s*", rest, re.S):
            name, arguments = match[1], match[2]
        checked = _object(arguments)
        if checked is None:
            return None
        calls.append(ToolCall(name, checked))
    return calls or None


def gemma(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads Gemma's call, call:name{key:value}: keys have no quotes, and strings stand between `GEMMA_QUOTE`s."""
    match = re.fullmatch(r"\s*call:([\w.-]+)\s*(\{.*\})\s*", text, re.S)
    if match is None:
        return None
    arguments = _object(match[2])
    if arguments is None:
        parts = match[2].split(GEMMA_QUOTE)
        parts[1::2] = [json.dumps(part, ensure_ascii=False) for part in parts[1::2]]
        parts[::2] = [re.sub(r"([{,]\s*)([\w.-]+)(\s*:)", r'\1"\2"\3', p) for p in parts[::2]]
        arguments = _object("".join(parts))
    return None if arguments is None else [ToolCall(match[1], arguments)]


def kimi(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads Kimi's calls, functions.name:0."""
    calls = []
    for part in re.findall(r"<\|tool_call_begin\|>(.*?)(?:<\|tool_call_end\|>|$)", text, re.S):
        head, _, rest = part.partition("<|tool_call_argument_begin|>")
        match = re.fullmatch(r"\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*", head)
        arguments = _object(rest)
        if match is None or arguments is None:
            return None
        calls.append(ToolCall(match[1], arguments))
    return calls or None


def channel(head: str) -> str:
    """Returns a channel's name, from the head before its message."""
    words = head.rpartition("<|channel|>")[2].split()
    return words[0] if words else ""


def recipient(head: str) -> str:
    """Returns the tool that a message's head addresses, "" for none."""
    match = re.search(r"to=(?:functions\.)?([\w.-]+)", head)
    return match[1] if match else ""


def in_channel(text: str, schemas: Schemas) -> list[ToolCall] | None:
    """Reads the head and the message of one of gpt-oss's channels."""
    head, _, body = text.partition("<|message|>")
    arguments, name = _object(body), recipient(head)
    return [ToolCall(name, arguments)] if name and arguments is not None else None
