"""Requests in OpenAI's dialect: chats and completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.serve import fields
from edgemoe.serve.ask import Ask, Wanted
from edgemoe.serve.preparing import continue_text, converse, encoded, sampled, will_say
from edgemoe.serve.problems import wrong
from edgemoe.serve.prompts import Conversation
from edgemoe.serve.service import Service
from edgemoe.serve.settings import seconds
from edgemoe.serve.sizes import kept_bytes

__all__ = ["read_chat", "read_completion", "thinking", "tool_choice"]

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n",
    "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip

_STREAMED = ("stream_options", "return_progress", "timings_per_token")
"""Fields that only change a stream."""
_MOST_PROMPTS = 4096
_STEP = 1 << 20  # bytes

_STRUCTURED: Mapping[str, tuple[type, ...]] = {
    "json": (dict, str), "regex": (str,), "choice": (list,), "grammar": (str,),
}  # fmt: skip
"""The fields of vLLM's structured_outputs, and their types."""


def _wanted(service: Service, request: Any, ignored: list[str]) -> Wanted:
    """Returns what chats and completions have in common."""
    sampling = {name: getattr(request, name) for name in _SAMPLING}
    sampling["max_tokens"] = request.max_tokens
    stop = request.stop
    if stop:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling["stop"] = stops
    if request.logit_bias:
        try:
            sampling["logit_bias"] = {int(k): v for k, v in request.logit_bias.items()}
        except ValueError:
            raise wrong("logit_bias", "expected numbers of tokens") from None
    if sampling["seed"] is not None and sampling["seed"] < 0:
        sampling["seed"] = -1
    if not request.stream:
        ignored += [name for name in _STREAMED if getattr(request, name)]
    keep_alive = None
    if request.keep_alive is not None:
        try:
            keep_alive = seconds(str(request.keep_alive))
        except ValueError as error:
            raise wrong("keep_alive", str(error)) from None
    slot, count = request.id_slot, len(service.batcher.views)
    if slot is not None and not -1 <= slot < count:
        raise wrong("id_slot", f"expected 0 to {count - 1}, or -1 for any, got {slot}")
    return Wanted(
        sampling=sampling, choices=request.n or 1, ignored=ignored, form=_form(request),
        slot=None if slot == -1 else slot, reuses=request.cache_prompt is not False,
        keep_alive=keep_alive, adapter=service.adapter(request.model, request.adapter),
    )  # fmt: skip


def _form(request: Any) -> tuple[str, str, Any] | None:
    """Returns the form of the answer, whichever field asks for it; see `Wanted.form`.

    Raises:
        Problem: several fields ask for a form, or one is wrong.
    """
    found: list[tuple[str, str, Any]] = []
    form = request.response_format
    if form is not None:
        kind = form.get("type")
        if kind == "json_object":
            schema = form.get("schema")  # llama.cpp's
            found.append(("json", "response_format", schema or {"type": "object"}))
        elif kind == "json_schema":
            inner = form.get("json_schema")
            if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
                raise wrong("response_format.json_schema", "expected an object with a schema")
            found.append(("json", "response_format.json_schema.schema", inner["schema"]))
        elif kind != "text":
            raise wrong(
                "response_format.type", f"expected text, json_object or json_schema, got {kind!r}"
            )
    for name, kind in (
        ("json_schema", "json"), ("guided_json", "json"), ("guided_regex", "regex"),
        ("guided_choice", "choice"), ("guided_grammar", "gbnf"), ("grammar", "gbnf"),
    ):  # fmt: skip
        value = getattr(request, name)
        if value not in (None, ""):  # llama.cpp's clients send an empty grammar for none
            found.append((kind, name, value))
    for name, value in (request.structured_outputs or {}).items():
        takes = _STRUCTURED.get(name)
        if takes is None:
            raise wrong(f"structured_outputs.{name}", "not supported")
        texts = value if isinstance(value, list) else ()
        if not isinstance(value, takes) or not all(isinstance(text, str) for text in texts):
            raise wrong(f"structured_outputs.{name}", f"not of its kind: {value!r:.80}")
        kind = "gbnf" if name == "grammar" else name
        found.append((kind, f"structured_outputs.{name}", value))
    if len(found) > 1:
        raise wrong(found[1][1], f"not together with {found[0][1]}")
    return found[0] if found else None


def thinking(*said: object) -> bool | None:
    """Returns whether to reason, from the values of all fields that may say so; None if none of them does."""
    for word in said:
        if word in (False, "none", "disabled", "off"):
            return False
        if isinstance(word, dict) and word.get("type") == "disabled":
            return False
    return True if any(word is not None for word in said) else None


def tool_choice(choice: object) -> str:
    """Returns `Wanted.tool_choice` from OpenAI's tool_choice, of chats or of responses.

    Raises:
        Problem: it is not valid.
    """
    if choice is None:
        return "auto"
    if choice in ("auto", "none", "required"):
        return str(choice)
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function") or choice
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return f"={name}"
    raise wrong("tool_choice", f"expected auto, none, required or a function, got {choice!r:.200}")


def read_chat(service: Service, body: bytes) -> tuple[fields.ChatRequest, Ask]:
    """Reads a chat's request, and renders and tokenizes its prompt, which takes a while for a long one.

    Raises:
        Problem: names what is wrong.
    """
    request, ignored = fields.read(body, fields.ChatRequest)
    wanted = _wanted(service, request, ignored)
    if request.max_completion_tokens is not None:
        wanted.sampling["max_tokens"] = request.max_completion_tokens
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", "expected logprobs to be true with it")
    wanted.top = (request.top_logprobs or 0) if request.logprobs else None
    wanted.thinks = thinking(
        request.reasoning_effort, request.think, request.thinking, request.enable_thinking
    )
    wanted.most_reasoning = fields.reasoning_budget(request.thinking or {}, ignored)
    wanted.effort = request.reasoning_effort
    wanted.variables = request.chat_template_kwargs or {}
    wanted.tool_choice = tool_choice(request.tool_choice)
    wanted.several_calls = request.parallel_tool_calls is not False
    tools = fields.functions(request.tools, ignored)
    wanted.strict = [
        f"tools[{i}].function.strict"
        for i, tool in enumerate(request.tools or ())
        if tool.function is not None and tool.function.strict
    ]
    ask = converse(service, Conversation(request.messages, tools), wanted)
    will_say(service, [ask], streams=bool(request.stream), at_once=1, built=450, written=200)
    fields.forget(request)
    return request, ask


def read_completion(service: Service, body: bytes) -> tuple[fields.CompletionRequest, list[Ask]]:
    """Reads a completion's request: one prompt or several, each as text or as tokens.

    Raises:
        Problem: names what is wrong.
    """
    request, ignored = fields.read(body, fields.CompletionRequest)
    wanted = _wanted(service, request, ignored)
    if request.logprobs is not None and not 0 <= request.logprobs <= fields.MOST_TOP:
        raise wrong("logprobs", f"expected 0 to {fields.MOST_TOP}, got {request.logprobs}")
    wanted.top = request.logprobs
    params = sampled(service, wanted.sampling)
    prompt: Any = request.prompt
    many = isinstance(prompt, list) and prompt and not all(isinstance(i, int) for i in prompt)
    if many and len(prompt) > _MOST_PROMPTS:
        raise wrong("prompt", f"expected at most {_MOST_PROMPTS}, got {len(prompt)}")
    asks: list[Ask] = []
    kept = 0
    for i, one in enumerate(prompt if many else [prompt]):
        where = f"prompt[{i}]" if many else "prompt"
        if isinstance(one, str):
            # In steps, as each may wait for the pass that runs.
            ids = encoded(service, one, where, add_special=True, beside=kept & ~(_STEP - 1))
        elif isinstance(one, list) and one and all(type(t) is int for t in one):
            size = service.model.config.vocab_size
            if not all(0 <= t < size for t in one):
                raise wrong(where, f"expected tokens from 0 to {size - 1}")
            ids = list(one)
        else:
            raise wrong(where, "expected text or tokens, at least one")
        asks.append(continue_text(service, ids, params, wanted, echo=bool(request.echo)))
        kept += kept_bytes(asks[-1].ids)
    streams = bool(request.stream)
    at_once = 1 if streams else len(service.batcher.views)
    will_say(service, asks, streams=streams, at_once=at_once, built=160, written=60)
    fields.forget(request)
    return request, asks
