"""OpenAI's newer dialect: responses. The server keeps none of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from edgemoe.serve import fields
from edgemoe.serve.answers import Answer, call_id
from edgemoe.serve.ask import Ask, Wanted
from edgemoe.serve.openai import thinking, tool_choice
from edgemoe.serve.preparing import converse
from edgemoe.serve.problems import Problem, wrong
from edgemoe.serve.prompts import Conversation
from edgemoe.serve.reply import Ended
from edgemoe.serve.service import Service
from edgemoe.serve.usage import usage_extras
from edgemoe.text.calls import ToolCall

__all__ = ["ResponsesAnswer", "read_responses"]

_REPEATED = ("instructions", "max_output_tokens", "reasoning", "text", "tool_choice", "tools")
"""Fields that a response repeats."""


def read_responses(service: Service, body: bytes) -> tuple[fields.ResponsesRequest, Ask]:
    """Reads a request, and renders and tokenizes its prompt, which takes a while for a long one.

    Raises:
        Problem: names what is wrong.
    """
    request, ignored = fields.read(body, fields.ResponsesRequest)
    reasoning = request.reasoning or {}
    effort, text = reasoning.get("effort"), request.text or {}
    wanted = Wanted(
        sampling={
            "max_tokens": request.max_output_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "seed": request.seed,
        },
        ignored=ignored, tool_choice=tool_choice(request.tool_choice),
        several_calls=request.parallel_tool_calls is not False, thinks=thinking(effort),
        effort=effort if isinstance(effort, str) else None, form=_form(text),
        adapter=service.adapter(request.model),
    )  # fmt: skip
    ignored += [f"reasoning.{name}" for name in reasoning if name != "effort" and reasoning[name]]
    ignored += [f"text.{name}" for name in text if name != "format" and text[name]]
    if request.top_logprobs:
        ignored.append("top_logprobs")
    tools = []
    for i, tool in enumerate(request.tools or ()):
        if tool.get("type") != "function":
            ignored.append(f"tools[{i}]: {tool.get('type')}")
        elif not isinstance(tool.get("name"), str):
            raise wrong(f"tools[{i}].name", "expected, and missing")
        else:
            wanted.strict += [f"tools[{i}].strict"] * (tool.get("strict") is True)
            tools.append({
                "name": tool["name"], "description": str(tool.get("description") or ""),
                "parameters": tool.get("parameters") or {},
            })  # fmt: skip
    messages = [{"role": "system", "content": request.instructions}] if request.instructions else []
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += _messages(request.input)
    ask = converse(service, Conversation(messages, tools), wanted)
    fields.forget(request, but=_REPEATED)
    return request, ask


def _form(text: dict[str, Any]) -> tuple[str, str, Any] | None:
    form = text.get("format") or {"type": "text"}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json", "text.format", {"type": "object"}
    if kind == "json_schema" and isinstance(form.get("schema"), dict):
        return "json", "text.format.schema", form["schema"]
    raise wrong("text.format", "expected text, json_object, or json_schema with a schema")


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the input of a response as messages of a chat, where calls belong to the message before them."""
    out: list[dict[str, Any]] = []
    thought = ""
    for i, item in enumerate(items):
        kind, at = item.get("type", "message"), f"input[{i}]"
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if thought and item.get("role") == "assistant":
                message["reasoning_content"], thought = thought, ""
            out.append(message)
        elif kind == "reasoning":
            parts = item.get("content") or ()
            if not isinstance(parts, (list, tuple)):
                raise wrong(f"{at}.content", "expected parts")
            thought = "\n".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))
        elif kind in ("function_call", "custom_tool_call"):
            arguments = item.get("arguments") or "{}"
            if kind == "custom_tool_call":  # its argument is bare text
                arguments = {"input": item.get("input")}
            function = {"name": item.get("name"), "arguments": arguments}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            out[-1].setdefault("tool_calls", []).append(call)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            out.append({
                "role": "tool", "tool_call_id": str(item.get("call_id")), "content": item.get("output"),
            })  # fmt: skip
        else:
            raise wrong(f"{at}.type", f"not supported here: {kind!r}")
    return out


class ResponsesAnswer(Answer):
    """The answer to a request for a response."""

    def __init__(self, service: Service, request: fields.ResponsesRequest, ask: Ask) -> None:
        super().__init__(service, [ask], streams=bool(request.stream))
        self._request = request
        self.id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = -1  # of the last event

    def failure(self, problem: Problem) -> bytes:
        """Returns the last event of a stream that failed."""
        error = {"code": problem.code or "server_error", "message": problem.message}
        failed = {**self._response("failed", []), "error": error}
        return self._numbered({"type": "response.failed", "response": failed})

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the answer as a stream of events."""
        async for event in self._events():
            yield self._numbered(event)

    def _numbered(self, event: dict[str, Any]) -> bytes:
        self._number += 1
        return _event({**event, "sequence_number": self._number})

    async def whole(self) -> dict[str, Any]:
        """Returns the answer once it is complete."""
        response: dict[str, Any] = {}
        async for event in self._events():
            response = event.get("response", response)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request, params = self._request, self.asks[0].params
        return {
            "id": self.id, "object": "response", "created_at": self._created, "status": status,
            "model": self.service.shown(self.asks[0].adapter), "output": output, "error": None,
            "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "parallel_tool_calls": self.asks[0].several_calls, "previous_response_id": None,
            "reasoning": {"effort": (request.reasoning or {}).get("effort"), "summary": None},
            "store": False, "temperature": params.temperature, "top_p": params.top_p,
            "text": request.text or {"format": {"type": "text"}}, "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [], "truncation": "disabled", "usage": None, "metadata": {},
        }  # fmt: skip

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "response.created", "response": self._response("in_progress", [])}
        yield {"type": "response.in_progress", "response": self._response("in_progress", [])}
        items = _Items(self.id)
        async for part in self.first.parts():
            if isinstance(part, Ended):
                break
            for event in part.events:
                made = (
                    items.call(event)
                    if isinstance(event, ToolCall)
                    else items.text(event.kind, event.text)
                )
                for one in made:
                    yield one
        assert isinstance(part, Ended)
        for one in items.close():
            yield one
        is_cut = part.finish == "length"
        figures = part.figures
        done = self._response("incomplete" if is_cut else "completed", items.done)
        if is_cut:
            done["incomplete_details"] = {"reason": "max_output_tokens"}
        done["usage"] = {
            "input_tokens": figures.prompt_tokens, "output_tokens": figures.new_tokens,
            "total_tokens": figures.prompt_tokens + figures.new_tokens,
            "input_tokens_details": {"cached_tokens": figures.cached_tokens},
            "output_tokens_details": {"reasoning_tokens": part.reasoning_tokens},
        }  # fmt: skip
        done["edgemoe"] = usage_extras(figures, self.asks[0], self.service.model.notes)
        yield {"type": f"response.{done['status']}", "response": done}


class _Items:
    """The output items of a response, as events, one item after another."""

    def __init__(self, response: str) -> None:
        self._response, self._kind, self._text = response.replace("resp_", "-"), "", ""
        self.done: list[dict[str, Any]] = []

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._id(), "output_index": len(self.done)}

    def _id(self) -> str:
        prefix = {"content": "msg_", "reasoning": "rs_", "call": "fc_"}[self._kind]
        return call_id(prefix, self._response, len(self.done))

    def text(self, kind: str, text: str) -> list[dict[str, Any]]:
        """Returns the events that add text or reasoning."""
        out = []
        if kind != self._kind:
            out = self.close()
            self._kind, self._text = kind, ""
            out.append({
                "type": "response.output_item.added", "output_index": len(self.done),
                "item": self._item("in_progress"),
            })  # fmt: skip
            if kind == "content":
                out.append({
                    "type": "response.content_part.added", **self._at(), "content_index": 0,
                    "part": _part(""),
                })  # fmt: skip
        self._text += text
        name = "output_text" if kind == "content" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
        out.append({
            "type": f"response.{name}.delta", **self._at(), "content_index": 0, "delta": text, **more,
        })  # fmt: skip
        return out

    def call(self, call: ToolCall) -> list[dict[str, Any]]:
        """Returns the events of a tool call."""
        out = self.close()
        self._kind = "call"
        item = {
            "id": self._id(), "type": "function_call", "status": "in_progress", "name": call.name,
            "call_id": call_id("call_", self._response, len(self.done)), "arguments": "",
        }  # fmt: skip
        kind = "response.function_call_arguments"
        out += [
            {"type": "response.output_item.added", "output_index": len(self.done), "item": item},
            {"type": f"{kind}.delta", **self._at(), "delta": call.arguments},
            {"type": f"{kind}.done", **self._at(), "name": call.name, "arguments": call.arguments},
        ]
        item = {**item, "status": "completed", "arguments": call.arguments}
        out.append(
            {"type": "response.output_item.done", "output_index": len(self.done), "item": item}
        )
        self.done.append(item)
        self._kind = ""
        return out

    def close(self) -> list[dict[str, Any]]:
        """Returns the events that end the open item, if there is one."""
        if not self._kind:
            return []
        item, out = self._item("completed"), []
        if self._kind == "content":
            out = [
                {"type": "response.output_text.done", **self._at(), "content_index": 0, "text": self._text,
                 "logprobs": []},
                {"type": "response.content_part.done", **self._at(), "content_index": 0,
                 "part": _part(self._text)},
            ]  # fmt: skip
        else:
            out = [{
                "type": "response.reasoning_text.done", **self._at(), "content_index": 0, "text": self._text,
            }]  # fmt: skip
        out.append(
            {"type": "response.output_item.done", "output_index": len(self.done), "item": item}
        )
        self.done.append(item)
        self._kind = ""
        return out

    def _item(self, status: str) -> dict[str, Any]:
        if self._kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self._text}] if self._text else []
            return {
                "id": self._id(),
                "type": "reasoning",
                "summary": [],
                "content": content,
                "status": status,
            }
        content = [_part(self._text)] if self._text else []
        return {
            "id": self._id(), "type": "message", "role": "assistant", "status": status, "content": content,
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"
