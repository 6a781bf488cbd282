"""The server's OpenAPI description, made from the types by which it reads requests."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec

import edgemoe
from edgemoe.serve import about, fields
from edgemoe.serve.actions import ACTIONS, Named
from edgemoe.serve.steering import Change

__all__ = ["description"]

_POSTS: Mapping[str, tuple[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ("Answers a chat.", fields.ChatRequest),
    "/v1/completions": ("Goes on with a text, or with tokens.", fields.CompletionRequest),
    "/v1/messages": ("Answers a chat in Anthropic's dialect.", fields.MessagesRequest),
    "/v1/messages/count_tokens": ("Counts the tokens of its prompt.", fields.CountRequest),
    "/v1/responses": ("Answers in OpenAI's newer dialect; nothing is kept.", fields.ResponsesRequest),
    "/tokenize": ("Returns a text's tokens.", about.Tokenize),
    "/detokenize": ("Returns the text of tokens.", about.Detokenize),
    "/apply-template": ("Returns the prompt of a chat.", about.Template),
    "/settings": ("Changes how the model runs, for all; what is not said stays.", Change),
    "/slots/{slot}": ("Saves a sequence under a name, restores it, or erases it.", Named),
}  # fmt: skip
_GETS: Mapping[str, str] = {
    "/": "Returns name and version, or the page to a browser.",
    "/health": "Says whether the server answers.",
    "/v1/models": "Lists the model, under all its names, and with each of its adapters.",
    "/props": "Says how the model runs.",
    "/slots": "Says what each sequence does.",
    "/events": "Streams what the page shows, as text/event-stream, without an end.",
    "/shelf": "Says what the levels cost, and which other models are on this machine.",
    "/metrics": "Returns all figures in the format of Prometheus.",
}
_SLOT = [
    {"name": "slot", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}},
    {"name": "action", "in": "query", "required": True, "schema": {"enum": list(ACTIONS)}},
]
_TEXT_PART = {
    "type": "object", "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}  # fmt: skip
_MESSAGE = {
    "type": "object", "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
}  # fmt: skip
"""What messages of all dialects have in common. The rest of a message has no type, as code reads it."""
_ERRORS = {
    "400": "What was sent is wrong; the error names the field.",
    "401": "A key is needed.",
    "403": "The server was asked for under another name than its own.",
    "413": "The body is too large.",
    "429": "Too many requests wait.",
    "503": "The server loads, stops, or gave the request up.",
}


@functools.cache
def description(*lacks: str) -> bytes:
    """Returns the description as JSON, without some paths that the server does not have."""
    posts = {path: post for path, post in _POSTS.items() if path not in lacks}
    kinds = [kind for _, kind in posts.values()]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    components["Message"] = _MESSAGE
    messages = {
        "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"},
    }  # fmt: skip
    for kind in kinds:
        properties = components[kind.__name__]["properties"]
        if "messages" in properties:
            properties["messages"] = messages
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": _responses()}}
        for path, summary in _GETS.items() if path not in lacks
    }  # fmt: skip
    for (path, (summary, kind)), schema in zip(posts.items(), schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        if "stream" in kind.__struct_fields__:
            summary += " With stream, the answer is text/event-stream."
        paths[path] = {"post": {
            "summary": summary, "requestBody": {"required": True, "content": content},
            "responses": _responses(streams="stream" in kind.__struct_fields__),
        }}  # fmt: skip
        if kind is Named:
            paths[path]["post"]["parameters"] = _SLOT
    return msgspec.json.encode({
        "openapi": "3.1.0", "info": {"title": "edgemoe", "version": edgemoe.__version__},
        "paths": paths, "components": {"schemas": components},
    })  # fmt: skip


def _responses(*, streams: bool = False) -> dict[str, Any]:
    kinds = ["application/json"] + ["text/event-stream"] * streams
    fine = {"description": "The answer.", "content": {kind: {} for kind in kinds}}
    failed = {"content": {"application/json": {"schema": {"type": "object"}}}}
    return {"200": fine, **{code: {"description": d, **failed} for code, d in _ERRORS.items()}}
