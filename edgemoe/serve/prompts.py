"""Rendering of conversations, as clients send them, into prompts, as models know them.

It must be deterministic: a prompt that differs shares no prefix with what was computed before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgemoe.serve.problems import Problem, wrong
from edgemoe.text.replies import ReplyFormat
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Conversation", "render"]

Message = dict[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_NAME = re.compile(r"[\w.:/-]{1,128}")
_BILLING = "x-anthropic-billing-header:"
_TAKEN = {"messages", "tools", "most_characters", "self"}
"""Variables of templates that a client must not set."""
_REFUSED = {
    "function_call": "not supported; say tool_calls",
    "audio": "this model reads text alone",
    "images": "this model reads text alone",
}
"""Fields of messages that are refused, and why: to ignore one would leave out a part of the conversation."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class Conversation:
    """Messages and tools in the format of OpenAI's chats, checked and normalised.

    Leading system messages are joined into one, without the billing attributions that some clients send.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Reads messages and tools.

        Args:
            messages: as in a chat's request.
            tools: {"name", "description", "parameters"} each.

        Raises:
            Problem: names the message or tool, and what is wrong with it.
        """
        if not messages:
            raise wrong("messages", "expected at least one, got none")
        read = [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]
        first = next((i for i, m in enumerate(read) if m["role"] != "system"), len(read))
        texts = [m["content"] for m in read[:first] if not m["content"].startswith(_BILLING)]
        leading = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
        self.messages: list[Message] = leading + read[first:]
        if not self.messages:
            raise wrong("messages", "expected more than an attribution")
        for i, tool in enumerate(tools):
            if not _NAME.fullmatch(tool["name"]):
                raise wrong(
                    f"tools[{i}]",
                    f"expected a name of letters, digits and _ . : / -, got {tool['name']!r:.80}",
                )
            if any(tool["name"] == other["name"] for other in tools[:i]):
                # A call could not say which of the two it means.
                raise wrong(
                    f"tools[{i}]", f"expected a name of its own, got {tool['name']!r} again"
                )
        self.tools = [dict(tool) for tool in tools]


def _message(message: Mapping[str, Any], where: str) -> Message:
    role = message.get("role")
    role = {"developer": "system", "function": "tool"}.get(str(role), role)
    if role not in _ROLES:
        raise wrong(f"{where}.role", f"expected one of {', '.join(_ROLES)}, got {role!r}")
    for name, why in _REFUSED.items():
        if message.get(name):
            raise wrong(f"{where}.{name}", why)
    out: Message = {"role": role, "content": _content(message.get("content"), f"{where}.content")}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(f"{where}.{name}", f"expected text, got {type(value).__name__}")
        if value:
            out[name] = value
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise wrong(f"{where}.tool_calls", "expected a list")
        out["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
    return out


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, f"expected text or parts, got {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            raise wrong(f"{where}[{i}].type", f"this model reads only text; got {kind!r}")
        text = part.get("text", part.get("refusal", ""))
        if not isinstance(text, str):
            raise wrong(f"{where}[{i}].text", f"expected text, got {type(text).__name__}")
        texts.append(text)
    return "\n".join(texts)


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise wrong(where, "expected a call of a function")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not isinstance(arguments, (str, dict)):
        raise wrong(f"{where}.function", "expected a name, and arguments as text")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            read = None
        if isinstance(read, dict):  # templates expect an object
            arguments = read
    function = {"name": name, "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}


def render(
    tokenizer: Tokenizer,
    talk: Conversation,
    form: ReplyFormat,
    *,
    most_characters: int,
    variables: Mapping[str, Any],
    notes: list[str],
) -> str:
    """Returns the prompt of a conversation.

    If the template refuses the messages, they are reworded, always in the same order: later system messages become the
    user's; adjacent messages of one role become one; the system text is put before the first message; and, of the
    original messages, arguments of calls become text.

    Args:
        tokenizer: has the template.
        talk: the conversation.
        form: how the model writes reasoning and calls.
        most_characters: the longest prompt.
        variables: further variables of the template.
        notes: gets a line if the messages are reworded.

    Raises:
        Problem: the template refuses all wordings, or the prompt becomes too long.
    """
    messages, tools = talk.messages, talk.tools
    given: dict[str, Any] = dict(variables)
    for name in _TAKEN & given.keys():
        raise wrong(
            f"chat_template_kwargs.{name}", "has a field of its own, or is the server's to say"
        )
    if tools and tokenizer.knows_tools:
        given["tools"] = [{"type": "function", "function": tool} for tool in tools]
    elif tools:
        messages = _with_described(messages, tools)
    if not tokenizer.knows_tools:
        messages = [_plain(m) for m in messages]
    refusal = ""
    for how, words in _wordings(messages):
        try:
            text = tokenizer.render_chat(words, most_characters=most_characters, **given)
        except ValueError as error:
            refusal = refusal or str(error)
            continue
        if how:
            notes.append(f"messages were reworded for the model's template: {how}")
        return text
    raise Problem(400, f"messages: {refusal}", param="messages")


def _wordings(messages: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    yield "", messages
    words = [
        {**m, "role": "user", "content": f"[system]\n{m['content']}"} if i and m["role"] == "system" else m
        for i, m in enumerate(messages)
    ]  # fmt: skip
    yield "later system messages are the user's", words
    words = _merged(words)
    yield "neighbours of one role are one message", words
    if words[0]["role"] == "system" and len(words) > 1:
        first = {**words[1], "content": f"{words[0]['content']}\n\n{words[1]['content']}"}
        yield "the system's words stand before the first message", [first, *words[2:]]
    texts = [
        {**m, "tool_calls": [
            {**c, "function": {**c["function"], "arguments": _dumped(c["function"]["arguments"])}}
            for c in m["tool_calls"]
        ]} if "tool_calls" in m else m
        for m in messages
    ]  # fmt: skip
    yield "arguments of calls are text", texts


def _merged(messages: list[Message]) -> list[Message]:
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        plain = last is not None and not ({"tool_calls", "tool_call_id"} & {*last, *message})
        if last is not None and plain and last["role"] == message["role"]:
            out[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            out.append(message)
    return out


def _with_described(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Returns messages whose system text describes the tools, for a template that does not know tools."""
    text = (
        "You may call tools. To call one, write exactly\n<tool_call>\n"
        '{"name": the tool\'s name, "arguments": an object}\n</tool_call>\nThe tools are, one a line:\n'
    ) + "\n".join(_dumped(tool) for tool in tools)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _plain(message: Message) -> Message:
    """Returns a message of plain text for one with tool calls or with the result of a tool."""
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    if "tool_calls" not in message:
        return message
    calls = "\n".join(
        f"<tool_call>\n{_dumped(c['function'])}\n</tool_call>" for c in message["tool_calls"]
    )
    return {"role": "assistant", "content": f"{message['content']}\n{calls}".strip()}


def _dumped(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
