"""Anthropic's dialect: messages, whole and streamed, and counting their tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from edgemoe.serve import fields
from edgemoe.serve.answers import Answer, call_id
from edgemoe.serve.ask import Ask, Wanted
from edgemoe.serve.preparing import converse
from edgemoe.serve.problems import Problem, wrong
from edgemoe.serve.prompts import Conversation
from edgemoe.serve.reply import Ended
from edgemoe.serve.service import Service
from edgemoe.serve.usage import usage_extras
from edgemoe.text.calls import ToolCall

__all__ = ["MessagesAnswer", "count", "read_messages"]

_SIGNATURE = "edgemoe"  # of thinking: clients send it back, and it is not checked


def read_messages(service: Service, body: bytes) -> tuple[fields.MessagesRequest, Ask]:
    """Reads a request, and renders and tokenizes its prompt, which takes a while for a long one.

    Raises:
        Problem: names what is wrong.
    """
    request, ignored = fields.read(body, fields.MessagesRequest)
    wanted = Wanted(
        sampling={
            "max_tokens": request.max_tokens, "temperature": request.temperature, "top_p": request.top_p,
            "top_k": request.top_k, "stop": tuple(request.stop_sequences) if request.stop_sequences else None,
        },
        ignored=ignored, adapter=service.adapter(request.model),
    )  # fmt: skip
    ask = converse(service, _talk(request, wanted), wanted)
    fields.forget(request)
    return request, ask


def count(service: Service, body: bytes) -> dict[str, Any]:
    """Returns the number of tokens of a request's prompt.

    Raises:
        Problem: names what is wrong.
    """
    request, ignored = fields.read(body, fields.CountRequest)
    wanted = Wanted(ignored=ignored)
    ask = converse(service, _talk(request, wanted), wanted)
    service.note(ignored)
    return {"input_tokens": len(ask.ids)}


def _talk(request: Any, wanted: Wanted) -> Conversation:
    """Returns the conversation of a request, and sets what the request says about tools and thinking in `wanted`."""
    choice = request.tool_choice or {"type": "auto"}
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise wrong("tool_choice.type", f"expected auto, any, tool or none, got {kind!r}")
    wanted.tool_choice = {"any": "required", "tool": f"={choice.get('name')}"}.get(kind, kind)
    wanted.several_calls = choice.get("disable_parallel_tool_use") is not True
    thinking = request.thinking or {}
    if thinking:
        wanted.thinks = thinking.get("type") != "disabled"
        wanted.most_reasoning = fields.reasoning_budget(thinking, wanted.ignored)
    tools = []
    for i, tool in enumerate(request.tools or ()):
        name, schema = tool.get("name"), tool.get("input_schema")
        if tool.get("type", "custom") != "custom":  # a tool that Anthropic's servers would run
            wanted.ignored.append(f"tools[{i}]: {tool['type']}")
        elif not isinstance(name, str) or not isinstance(schema, dict):
            raise wrong(f"tools[{i}]", "expected a name and an input_schema")
        else:
            wanted.strict += [f"tools[{i}].strict"] * (tool.get("strict") is True)
            tools.append(
                {
                    "name": name,
                    "description": str(tool.get("description") or ""),
                    "parameters": schema,
                }
            )
    messages = [{"role": "system", "content": text} for text in _system(request.system)]
    for i, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{i}]", wanted.ignored)
    return Conversation(messages, tools)


def _system(system: str | list[dict[str, Any]] | None) -> list[str]:
    if isinstance(system, str):
        return [system] if system else []
    texts = []
    for i, part in enumerate(system or ()):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"system[{i}]", "expected a part of text")
        texts.append(part["text"])
    return texts


def _messages(message: Mapping[str, Any], where: str, ignored: list[str]) -> list[dict[str, Any]]:
    """Returns one of Anthropic's messages in OpenAI's format, where each result of a tool is a message of its own.

    Names parts without effect in `ignored`.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong(f"{where}.role", f"expected user or assistant, got {role!r}")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise wrong(f"{where}.content", "expected text or parts")
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking":
            thoughts.append(str(part.get("thinking") or ""))
        elif kind == "redacted_thinking":
            if kind not in ignored:
                ignored.append(kind)
        elif kind == "tool_use":
            function = {"name": part.get("name"), "arguments": part.get("input") or {}}
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            inner = part.get("content")
            result = inner if isinstance(inner, str) or inner is None else _result(inner, at)
            out.append(
                {
                    "role": "tool",
                    "tool_call_id": str(part.get("tool_use_id")),
                    "content": result or "",
                }
            )
        else:
            raise wrong(f"{at}.type", f"this model reads only text; got {kind!r}")
    if texts or calls or thoughts or not out:
        rest: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
        if calls:
            rest["tool_calls"] = calls
        if thoughts:
            rest["reasoning_content"] = "\n".join(thoughts)
        out.append(rest)
    return out


def _result(parts: Any, where: str) -> str:
    if not isinstance(parts, list) or not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in parts
    ):
        raise wrong(f"{where}.content", "expected text, as this model reads only text")
    return "\n".join(p["text"] for p in parts)


class MessagesAnswer(Answer):
    """The answer to a request for messages."""

    def __init__(self, service: Service, request: fields.MessagesRequest, ask: Ask) -> None:
        super().__init__(service, [ask], streams=bool(request.stream))
        self.id = f"msg_{uuid.uuid4().hex}"

    def ping(self) -> bytes:
        """See `Answer.ping`."""
        return b'event: ping\ndata: {"type": "ping"}\n\n'

    def failure(self, problem: Problem) -> bytes:
        """Returns the last event of a stream that failed."""
        return _event("error", problem.body(is_messages=True))

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the answer as a stream of events."""
        async for event in self._events():
            yield _event(event["type"], event)

    async def whole(self) -> dict[str, Any]:
        """Returns the answer once it is complete, assembled from its events."""
        message: dict[str, Any] = {}
        async for event in self._events():
            kind = event["type"]
            if kind == "message_start":
                message = event["message"]
            elif kind == "content_block_start":
                block = event["content_block"]
                message["content"].append(block)
                text = ""
            elif kind == "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "text_delta":
                    block["text"] += delta["text"]
                elif delta["type"] == "thinking_delta":
                    block["thinking"] += delta["thinking"]
                elif delta["type"] == "signature_delta":
                    block["signature"] = delta["signature"]
                else:
                    text += delta["partial_json"]
                    block["input"] = json.loads(text)
            elif kind == "message_delta":
                message |= event["delta"]
                message["usage"] = event["usage"]
                message["edgemoe"] = event["edgemoe"]
        return message

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        ask, reply = self.asks[0], self.first
        usage: dict[str, Any] = {
            "input_tokens": len(ask.ids), "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }  # fmt: skip
        yield {"type": "message_start", "message": {
            "id": self.id, "type": "message", "role": "assistant", "model": self.service.shown(ask.adapter),
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
        }}  # fmt: skip
        blocks = _Blocks(self.id)
        async for part in reply.parts():
            if isinstance(part, Ended):
                break
            for event in part.events:
                if isinstance(event, ToolCall):
                    made = blocks.call(event)
                else:
                    made = blocks.text(
                        "thinking" if event.kind == "reasoning" else "text", event.text
                    )
                for one in made:
                    yield one
        assert isinstance(part, Ended)
        for one in blocks.close():
            yield one
        figures = part.figures
        reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
        reason = "stop_sequence" if part.stop and part.finish == "stop" else reasons[part.finish]
        usage = {
            "input_tokens": figures.prompt_tokens - figures.cached_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": figures.cached_tokens, "output_tokens": figures.new_tokens,
        }  # fmt: skip
        yield {
            "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": part.stop},
            "usage": usage, "edgemoe": usage_extras(figures, ask, self.service.model.notes),
        }  # fmt: skip
        yield {"type": "message_stop"}


class _Blocks:
    """The content blocks of a message, as events, one block after another."""

    def __init__(self, message: str) -> None:
        self._message, self._kind, self._index, self._calls = message, "", -1, 0

    def text(self, kind: str, text: str) -> list[dict[str, Any]]:
        """Returns the events that add text or thinking."""
        out = [] if kind == self._kind else self._open(
            kind, {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
        )  # fmt: skip
        return [*out, self._delta({"type": f"{kind}_delta", kind: text})]

    def call(self, call: ToolCall) -> list[dict[str, Any]]:
        """Returns the events of a tool call."""
        name = call_id("toolu_", self._message.replace("msg_", "-"), self._calls)
        self._calls += 1
        out = self._open("call", {"type": "tool_use", "id": name, "name": call.name, "input": {}})
        return [
            *out,
            self._delta({"type": "input_json_delta", "partial_json": call.arguments}),
            *self.close(),
        ]

    def close(self) -> list[dict[str, Any]]:
        """Returns the events that end the open block, if there is one."""
        if not self._kind:
            return []
        out = [{"type": "content_block_stop", "index": self._index}]
        if self._kind == "thinking":
            out.insert(0, self._delta({"type": "signature_delta", "signature": _SIGNATURE}))
        self._kind = ""
        return out

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        out = self.close()
        self._kind = kind
        self._index += 1
        return [*out, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _event(kind: str, data: object) -> bytes:
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"
