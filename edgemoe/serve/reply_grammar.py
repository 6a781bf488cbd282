"""Grammars of whole replies: the calls of tools, and the channels that some models write in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgemoe.serve.grammar import Grammars, spaced
from edgemoe.text.calls import markers
from edgemoe.text.replies import ReplyFormat

__all__ = ["channels", "reply_grammar"]

_MOST_CALLS = 16  # in a reply that must call a tool: a weak model may never end by itself
_MOST_BEFORE = 8  # messages before the answer, for models that write in channels; likewise
_NAMED, _VALUES = ("properties", "$defs", "definitions"), ("enum", "const", "default", "examples")
_JOINED = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "unevaluatedProperties")
"""Keywords next to which a schema may have more properties than "properties" lists; see `_closed`."""


def reply_grammar(
    grammars: Grammars, form: ReplyFormat, tools: Sequence[Mapping[str, Any]], answer: str | None, *,
    must: bool, several: bool, most_reasoning: int,
) -> tuple[str | None, dict[int, str]]:  # fmt: skip
    """Returns the grammars that constrain a reply.

    Args:
        grammars: checks what is made.
        form: how the model writes reasoning and calls.
        tools: those that may be called; empty for none.
        answer: the grammar of the answer; None for free text.
        must: one of the tools has to be called.
        several: more than one call is allowed.
        most_reasoning: the most tokens of reasoning, where a grammar limits it; -1 for no limit.

    Returns:
        A grammar of the whole reply, or None; and grammars that begin after a certain token, by that token.

    Raises:
        Problem: what the reply must be cannot be enforced.
    """
    if form.is_channelled:
        if not tools and answer is None and most_reasoning < 0:
            return None, {}
        return channels(grammars, tools, answer, must=must, most_reasoning=most_reasoning), {}
    if must:
        return _calls(grammars, form, tools, several=several), {}
    token = grammars.tokenizer.token_id(form.opener)
    if token is None:
        return _free_calls(grammars, form, tools), {}
    return None, {token: _calls(grammars, form, tools, several=False, after=form.opener)}


def _calls(
    grammars: Grammars,
    form: ReplyFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    several: bool,
    after: str = "",
) -> str:
    """Returns the grammar of tool calls, as a model writes them.

    Args:
        grammars: checks what is made.
        form: how the model writes.
        tools: those that may be called.
        several: more than one call is allowed.
        after: the beginning of the first call, if that is written already.
    """
    one = " | ".join(f"call{i}" for i in range(len(tools)))
    many = several and not after and bool(form.closer)
    start = (
        f'start: calls ("\\n" calls){{0,{_MOST_CALLS - 1}}}\ncalls: {one}'
        if many
        else f"start: {one}"
    )
    return grammars.lark("tools", "\n".join([start, *_each(grammars, form, tools, after)]))


def _free_calls(grammars: Grammars, form: ReplyFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the grammar of free text with tool calls, whose arguments must follow their schemas."""
    rules = ["start: (begun call)* TEXT", f"begun[lazy]: TEXT {json.dumps(form.opener)}"]
    rules += ["TEXT: /(.|\\n)*/", f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}"]
    return grammars.lark("tools", "\n".join([*rules, *_each(grammars, form, tools, form.opener)]))


def _each(
    grammars: Grammars, form: ReplyFormat, tools: Sequence[Mapping[str, Any]], after: str
) -> Iterator[str]:
    """Yields the rules of each tool's call, callN; `after` is its beginning that is written already."""
    for i, tool in enumerate(tools):
        before = form.before.replace("{name}", str(tool["name"])).removeprefix(after)
        yield f"call{i}: {_literal(grammars, before)} args{i} {_literal(grammars, form.after)}"
        yield _arguments(grammars, i, tool)


def channels(
    grammars: Grammars,
    tools: Sequence[Mapping[str, Any]],
    answer: str | None,
    *,
    must: bool,
    most_reasoning: int = -1,
) -> str:
    """Returns the grammar of a whole reply in channels, as gpt-oss writes it.

    Reasoning is free text, even before a call that has to come.

    Args:
        grammars: checks what is made.
        tools: those that may be called.
        answer: the grammar of the final channel; None for free text.
        must: a tool has to be called.
        most_reasoning: the most tokens of reasoning; -1 for no limit.
    """
    end, on = _literal(grammars, "<|end|><|start|>"), _literal(grammars, "<|channel|>")
    body, form = _literal(grammars, "<|message|>"), _literal(grammars, "<|constrain|>")
    form = f'(" json" | " "? {form} "json")?'
    rules = ["TEXT: /(.|\\n)*/"]
    kinds = [] if most_reasoning == 0 else ['"analysis"']
    kinds += ['"commentary"'] * bool(tools)
    before = "" if not kinds else "before?" if most_reasoning > 0 else f"before{{0,{_MOST_BEFORE}}}"
    if kinds:
        limit = f"[max_tokens={most_reasoning}]" if most_reasoning > 0 else ""
        rules += [
            f'before: {on} ({" | ".join(kinds)}) {body} thought {end} "assistant"',
            f"thought{limit}: TEXT",
        ]
    ends = [f"call{i}" for i in range(len(tools))]
    if not must:
        ends.append("final")
        text = "TEXT" if answer is None else "@answer"
        rules.append(f'final: {on} "final" {form} {body} {text}')
    for i, tool in enumerate(tools):
        name = json.dumps(f" to=functions.{tool['name']}")
        rules += [
            f'call{i}: (head{i} | {name} {on} "commentary") {form} {body} args{i} {_literal(grammars, "<|call|>")}',
            f'head{i}: {on} "commentary" {name}',
            _arguments(grammars, i, tool),
        ]
    lark = "\n".join([f"start: {before} ({' | '.join(ends)})", *rules])
    if answer is None:
        return grammars.lark("tools", lark)
    inner = (
        json.loads(answer)["grammars"][0] if answer.startswith("{") else {"lark_grammar": answer}
    )
    whole = [{"name": "reply", "lark_grammar": lark}, {**inner, "name": "answer"}]
    return grammars.checked("response_format", json.dumps({"grammars": whole}))


def _arguments(grammars: Grammars, i: int, tool: Mapping[str, Any]) -> str:
    """Returns the rule of a tool's arguments; raises as `Grammars.json_schema` does."""
    schema = _closed(tool.get("parameters") or {"type": "object"})
    grammars.json_schema(f"tools[{i}].function.parameters", schema)
    return f"args{i}: %json {json.dumps(spaced(schema))}"


def _literal(grammars: Grammars, text: str) -> str:
    """Returns a text in Lark's notation, in which special tokens are written as token numbers."""
    parts: list[str] = []
    while text:
        found = [(text.find(m), m) for m in markers(text) if grammars.special(m) is not None]
        at, mark = min(found, default=(len(text), ""))
        if at:
            parts.append(json.dumps(text[:at], ensure_ascii=False))
        if mark:
            parts.append(f"<[{grammars.special(mark)}]>")
        text = text[at + len(mark) :]
    return " ".join(parts) or '""'


def _closed(schema: Any) -> Any:
    """Returns a schema whose objects have no other properties than it names, unless it says otherwise.

    A tool has no use for properties that it does not know, and a weak model may add them endlessly.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):  # its keys are names, not keywords
            out[key] = {name: _closed(inner) for name, inner in value.items()}
        else:
            out[key] = value if key in _VALUES else _closed(value)
    is_open = not ({"additionalProperties", "patternProperties", *_JOINED} & schema.keys())
    if isinstance(schema.get("properties"), dict) and "type" in schema and is_open:
        out["additionalProperties"] = False
    return out
