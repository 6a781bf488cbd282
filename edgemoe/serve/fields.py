"""The fields of requests. Those that are honoured are typed here; any other is refused or reported as ignored."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from edgemoe.serve.problems import Problem, wrong

__all__ = [
    "CHAT_MESSAGES", "CHAT_TOOLS", "ChatRequest", "CompletionRequest", "CountRequest", "MessagesRequest",
    "ResponsesRequest", "Tool", "forget", "functions", "read", "reasoning_budget",
]  # fmt: skip

_MOST_MESSAGES, _MOST_TOOLS, MOST_STOPS, _MOST_CHOICES, MOST_TOP = 4096, 256, 16, 8, 20
_MOST_ENTRIES = {"logit_bias": 4096, "chat_template_kwargs": 256}  # they are copied several times
_MOST_NAMED = 1000  # fields without effect; of more, the rest is not looked for


class _Base(msgspec.Struct, kw_only=True, forbid_unknown_fields=False):
    model: str | None = None
    adapter: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    timings_per_token: bool | None = None
    keep_alive: int | str | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def plain(self) -> dict[str, Any]:
        """Returns it as chat templates see it."""
        return {
            "name": self.name,
            "description": self.description or "",
            "parameters": self.parameters or {},
        }


class Tool(msgspec.Struct):
    """A tool in the format of OpenAI's chats."""

    type: str
    function: Function | None = None


CHAT_TOOLS = ("function", Tool.__struct_fields__)
"""A dialect's form of tools: the type of those that a client runs, and their fields."""

CHAT_MESSAGES = (
    "role", "content", "name", "tool_call_id", "reasoning_content", "tool_calls", "type", "text", "refusal",
    "id", "index", "function",
)  # fmt: skip
"""The fields of a dialect's messages, of the parts of these and of calls, that are read or ask for nothing."""


def functions(tools: list[Tool] | None, ignored: list[str]) -> list[dict[str, Any]]:
    """Returns the functions of tools as chat templates see them; names tools of other kinds in `ignored`."""
    found = []
    for i, tool in enumerate(tools or ()):
        if tool.type != "function":
            ignored.append(f"tools[{i}]: {tool.type}")
        elif tool.function is None:
            raise wrong(f"tools[{i}].function", "expected, and missing")
        else:
            found.append(tool.function.plain())
    return found


def reasoning_budget(thinking: Mapping[str, Any], ignored: list[str]) -> int | None:
    """Returns the most tokens of reasoning that a field "thinking" allows; None if it does not say.

    Names its fields without effect in `ignored`.
    """
    known = ("type", "budget_tokens")
    ignored += [f"thinking.{n}" for n in thinking if n not in known and thinking[n]]
    budget = thinking.get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise wrong("thinking.budget_tokens", f"expected a whole number, got {budget!r}")
    return budget


class _Completion(_Base, kw_only=True):
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    cache_prompt: bool | None = None
    id_slot: int | None = None
    return_progress: bool | None = None
    logit_bias: dict[str, float] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class ChatRequest(_Completion, kw_only=True):
    """The body of /v1/chat/completions."""

    tool_form: ClassVar = CHAT_TOOLS
    message_fields: ClassVar = CHAT_MESSAGES

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    think: bool | str | None = None
    thinking: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(_Completion, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


class _MessagesBase(msgspec.Struct, kw_only=True):
    tool_form: ClassVar = ("custom", ("type", "name", "description", "input_schema", "strict"))
    message_fields: ClassVar = (
        "role", "content", "type", "text", "thinking", "signature", "data", "id", "name", "input",
        "tool_use_id",
    )  # fmt: skip

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class CountRequest(_MessagesBase, kw_only=True):
    """The body of /v1/messages/count_tokens."""


class MessagesRequest(_MessagesBase, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The body of /v1/responses."""

    tool_form: ClassVar = ("function", ("type", *Function.__struct_fields__))
    message_fields: ClassVar = (
        "role", "content", "type", "text", "refusal", "id", "status", "name", "call_id", "arguments", "input",
        "output", "annotations", "logprobs",
    )  # fmt: skip

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    seed: int | None = None


_ANSWERED = ("stream", "stream_options", "timings_per_token", "return_progress")
"""Fields that say how a request is answered."""


def forget(request: msgspec.Struct, *, but: Collection[str] = ()) -> None:
    """Drops what only the reading of a request needs, as it may be large.

    Args:
        request: is not checked any more: required fields are None afterwards.
        but: the fields that the answer repeats.
    """
    for name in request.__struct_fields__:
        if name not in _ANSWERED and name not in but:
            setattr(request, name, None)


_T = TypeVar("_T", bound=msgspec.Struct)

_REFUSED: Mapping[str, str] = {
    "functions": "not supported; say tools",
    "function_call": "not supported; say tool_choice",
    "audio": "this model makes no audio",
    "prediction": "not supported",
    "web_search_options": "there is no web search here",
    "best_of": "not supported",
    "suffix": "this model does not fill in between a beginning and an end",
    "previous_response_id": "this server keeps no responses; send the whole input",
    "background": "this server keeps no responses",
    "conversation": "this server keeps no conversations; send the whole input",
    "prompt_template": "not supported",
}
"""Fields that are refused, and why: to ignore one would give another answer than was asked for."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "modalities": (["text"],), "best_of": (1,), "suffix": ("",), "background": (False,),
    "truncation": ("disabled",), "stream_options": ({}, {"include_obfuscation": False}),
}  # fmt: skip
"""Values of fields that ask for nothing, and so are neither refused nor reported."""


_LISTS = ("messages", "system", "tools", "input")
"""Fields whose items, and the parts of these, may have a `cache_control`, which has no effect here."""


def read(body: bytes, kind: type[_T]) -> tuple[_T, list[str]]:
    """Reads a request's body.

    Args:
        body: JSON.
        kind: the type of the request.

    Returns:
        The request, and the names of the fields that were sent and have no effect here.

    Raises:
        Problem: the body is not JSON, or a field has the wrong type or cannot be honoured; says which.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Problem(400, f"body: expected JSON; {error}") from None
    if not isinstance(raw, dict):
        raise Problem(400, "body: expected a JSON object")
    known, ignored = set(kind.__struct_fields__), list[str]()
    for name, most in _MOST_ENTRIES.items():
        value = raw.get(name) if name in known else None
        if isinstance(value, dict) and len(value) > most:
            raise wrong(name, f"expected at most {most}, got {len(value)}")
    try:
        found = msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _located(str(error)) from None
    for name, value in raw.items():
        if name in known or value is None or value in _NEUTRAL.get(name, ()):
            continue
        if name == "modalities" or name in _REFUSED:
            raise wrong(name, _REFUSED.get(name, "this model reads and writes only text"))
        if len(ignored) < _MOST_NAMED:
            ignored.append(name)
    inner = _nested({name: value for name, value in raw.items() if name in known}, kind)
    ignored += itertools.islice(inner, _MOST_NAMED - len(ignored))
    _check_numbers(found)
    return found, ignored


def _nested(raw: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """Yields the names of fields without effect that are inside the honoured fields of a request of some kind."""
    parts = (part for name in _LISTS for part in _parts(raw.get(name)))
    if any(part.get("cache_control") is not None for part in parts):
        yield "cache_control"
    options = raw.get("stream_options")
    for name, value in options.items() if isinstance(options, dict) else ():
        if value is not None and name not in StreamOptions.__struct_fields__:
            yield f"stream_options.{name}"
    if "tools" in raw:
        yield from _in_tools(raw["tools"], *kind.tool_form)
    fields = getattr(kind, "message_fields", ())
    for name in ("messages", "system", "input") if fields else ():
        yield from _in_messages(name, raw.get(name), fields)


def _in_tools(tools: object, kind: str, known: Sequence[str]) -> Iterator[str]:
    """Yields the fields without effect inside tools, each where it comes first.

    Args:
        tools: the tools of a request. Those of another type are reported whole.
        kind: the type of the others.
        known: the fields of these.
    """
    seen = {"cache_control"}
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        if tool.get("type", kind) != kind:
            continue
        inner = tool.get("function") if "function" in known else None
        for where, part, fields in (
            (f"tools[{i}].", tool, known),
            (f"tools[{i}].function.", inner or {}, Function.__struct_fields__),
        ):
            for name in part:
                field = where.partition(".")[2] + name
                if part[name] and name not in fields and field not in seen:
                    seen.add(field)
                    yield where + name


def _in_messages(name: str, items: object, known: Sequence[str]) -> Iterator[str]:
    """Yields the fields without effect inside the messages of the field `name`, each once."""
    seen = {"cache_control", *known}
    for part in _parts(items):
        for field, value in part.items():
            if value and field not in seen:
                seen.add(field)
                yield f"{name}.{field}"


def _parts(items: object) -> Iterator[Mapping[str, Any]]:
    """Yields the objects of a list, and those of their contents and calls."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict):
            yield item
            yield from _parts(item.get("content"))
            yield from _parts(item.get("tool_calls"))


def _located(text: str) -> Problem:
    """Turns the text of a msgspec error, which ends with the field's path, into a `Problem` that names the field."""
    match = re.fullmatch(r"(.*) - at `\$\.?(.*)`", text)
    if match:
        return Problem(400, f"{match[2]}: {match[1]}", param=match[2] or None)
    if match := re.search(r"missing required field `(\w+)`", text):
        return Problem(400, f"{match[1]}: expected, and missing", param=match[1])
    return Problem(400, text)


def _check_numbers(found: Any) -> None:
    """Checks lengths of lists and ranges of numbers.

    Raises:
        Problem: names the field.
    """
    limits = {"messages": _MOST_MESSAGES, "tools": _MOST_TOOLS}
    for name, most in limits.items():
        items = getattr(found, name, None)
        if items is not None and len(items) > most:
            raise wrong(name, f"expected at most {most}, got {len(items)}")
    for name in ("stop", "stop_sequences"):
        stops = getattr(found, name, None)
        if isinstance(stops, list) and len(stops) > MOST_STOPS:
            raise wrong(name, f"expected at most {MOST_STOPS} texts, got {len(stops)}")
    choices = getattr(found, "n", None)
    if choices is not None and not 1 <= choices <= _MOST_CHOICES:
        raise wrong("n", f"expected 1 to {_MOST_CHOICES}, got {choices}")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        tokens = getattr(found, name, None)
        if tokens is not None and tokens < -1:
            raise wrong(name, f"expected 0 or more, or -1 for no limit, got {tokens}")
    top = getattr(found, "top_logprobs", None)
    if top is not None and not 0 <= top <= MOST_TOP:
        raise wrong("top_logprobs", f"expected 0 to {MOST_TOP}, got {top}")
