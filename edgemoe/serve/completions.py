"""Answers to chats and completions in OpenAI's format, whole and streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from edgemoe.serve.answers import Answer, call_id
from edgemoe.serve.ask import Ask
from edgemoe.serve.logprobs import chat_logprob, text_logprobs
from edgemoe.serve.problems import Problem
from edgemoe.serve.reply import Ended, Part, Progress, Reply
from edgemoe.serve.service import Service
from edgemoe.serve.usage import timings, usage_extras
from edgemoe.text.calls import ToolCall
from edgemoe.text.logprobs import TokenLogprob

__all__ = ["ChatAnswer", "TextAnswer"]


class _Completion(Answer):
    """The answer to one request, in OpenAI's format."""

    object = chunk_object = prefix = ""

    def __init__(self, service: Service, request: Any, asks: list[Ask]) -> None:
        super().__init__(service, asks, streams=bool(request.stream))
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.ended: list[Ended] = []

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.service.shown(self.asks[0].adapter),
            "system_fingerprint": self.service.fingerprint,
        }  # fmt: skip

    def usage(self, ended: list[Ended]) -> dict[str, Any]:
        """Returns the number of tokens of all choices, as OpenAI's "usage"; a prompt counts once for its choices."""
        per = self.asks[0].choices
        prompt = sum(e.figures.prompt_tokens for e in ended[::per])
        cached = sum(e.figures.cached_tokens for e in ended[::per])
        made = sum(e.figures.new_tokens for e in ended)
        thought = sum(e.reasoning_tokens for e in ended)
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }  # fmt: skip

    def _extras(self, ended: Ended) -> dict[str, Any]:
        notes = self.service.model.notes
        return {
            "timings": timings(ended.figures),
            "edgemoe": usage_extras(ended.figures, self.asks[0], notes),
        }

    async def whole(self) -> dict[str, Any]:
        """Returns the answer once it is complete."""
        choices = [_written(await self._choice(i, self.reply(i))) for i in range(self.count)]
        return {
            **self._head(self.object), "choices": choices, "usage": self.usage(self.ended),
            **self._extras(self.ended[-1]),
        }  # fmt: skip

    async def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        raise NotImplementedError

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the answer's chunks, one choice after another.

        Raises:
            Problem: a reply failed.
        """
        options = self.request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        running = options is not None and bool(options.continuous_usage_stats)
        head = self._head(self.chunk_object)
        for index in range(self.count):
            reply = self.reply(index)
            async for choice, made in self._pieces(index, reply):
                progress = choice.pop("prompt_progress", None)
                chunk = {**head, "choices": [choice]}
                if progress is not None:
                    chunk["prompt_progress"] = progress
                elif made and self.request.timings_per_token:
                    chunk["timings"] = reply.timings()
                if running and made is not None:
                    tokens = len(self.asks[0].ids)
                    chunk["usage"] = {
                        "prompt_tokens": tokens, "completion_tokens": made, "total_tokens": tokens + made,
                    }  # fmt: skip
                elif has_usage:
                    chunk["usage"] = None
                if choice.get("finish_reason"):
                    chunk |= self._extras(self.ended[-1])
                yield chunk
        if has_usage:
            yield {**head, "choices": [], "usage": self.usage(self.ended)}

    def _pieces(self, index: int, reply: Reply) -> AsyncIterator[tuple[dict[str, Any], int | None]]:
        raise NotImplementedError

    def _parts(self, reply: Reply) -> AsyncIterator[Part | Ended | Progress]:
        """Returns a reply's parts, with the progress of its prompt if the client asked for it."""
        return reply.watched() if self.request.return_progress else reply.parts()

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the answer as a stream of events."""
        async for chunk in self.stream():
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def failure(self, problem: Problem) -> bytes:
        """Returns the last event of a stream that failed."""
        return b"data: " + msgspec.json.encode(problem.body(is_messages=False)) + b"\n\n"


class ChatAnswer(_Completion):
    """The answer to a chat."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def call_name(self, index: int, number: int) -> str:
        """Returns the id of a call of a choice, which no other call of the answer has."""
        return call_id("call_", self.id, self.count * number + index)

    async def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        texts = {"content": "", "reasoning": ""}
        calls: list[dict[str, Any]] = []
        said: list[TokenLogprob] = []
        finish = "stop"
        async for part in reply.parts():
            if isinstance(part, Ended):
                self.ended.append(part)
                finish = part.finish
                break
            said += part.logprobs
            for event in part.events:
                if isinstance(event, ToolCall):
                    function = {"name": event.name, "arguments": event.arguments}
                    name = self.call_name(index, len(calls))
                    calls.append({"id": name, "type": "function", "function": function})
                else:
                    texts[event.kind] += event.text
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["content"] = texts["content"] or None
            message["tool_calls"] = calls
        return {
            "index": index, "message": message, "finish_reason": finish,
            "logprobs": self._logprobs(said),
        }  # fmt: skip

    async def _pieces(
        self, index: int, reply: Reply
    ) -> AsyncIterator[tuple[dict[str, Any], int | None]]:
        def chunk(
            delta: dict[str, Any], said: list[TokenLogprob], finish: str | None = None
        ) -> dict[str, Any]:
            return {
                "index": index, "delta": delta, "finish_reason": finish, "logprobs": self._logprobs(said),
            }  # fmt: skip

        yield chunk({"role": "assistant", "content": ""}, []), 0
        calls = made = 0
        async for part in self._parts(reply):
            if isinstance(part, Progress):
                yield {**chunk({}, []), "prompt_progress": _progress(part)}, None
                continue
            if isinstance(part, Ended):
                self.ended.append(part)
                yield chunk({}, [], part.finish), part.figures.new_tokens
                return
            made, said = part.tokens, part.logprobs
            for event in part.events:
                if isinstance(event, ToolCall):
                    name = self.call_name(index, calls)
                    head = {
                        "index": calls, "id": name, "type": "function",
                        "function": {"name": event.name, "arguments": ""},
                    }  # fmt: skip
                    yield chunk({"tool_calls": [head]}, said), made
                    rest = {"index": calls, "function": {"arguments": event.arguments}}
                    yield chunk({"tool_calls": [rest]}, []), made
                    calls += 1
                else:
                    key = "reasoning_content" if event.kind == "reasoning" else "content"
                    yield chunk({key: event.text}, said), made
                said = []
            if said:
                yield chunk({}, said), made

    def _logprobs(self, said: list[TokenLogprob]) -> dict[str, Any] | None:
        if self.asks[0].top is None:
            return None
        return {
            "content": [chat_logprob(self.service.tokenizer, one) for one in said],
            "refusal": None,
        }


class TextAnswer(_Completion):
    """The answer to a completion."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    async def whole(self) -> dict[str, Any]:
        """Returns the answer once it is complete. The prompts of one request run at the same time."""
        room = asyncio.Semaphore(max(1, len(self.service.batcher.views)))
        per = self.asks[0].choices
        ends: dict[int, Ended] = {}

        async def one(ask: int) -> list[msgspec.Raw]:
            out = []
            for i in range(ask * per, ask * per + per):
                async with room:
                    reply = self.reply(i)
                    choice, ended = await self._text(i, reply)
                ends[i] = ended
                out.append(_written(choice))
                reply.prompt_logprobs.clear()
            return out

        tasks = [asyncio.ensure_future(one(i)) for i in range(len(self.asks))]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        ended = [ends[i] for i in sorted(ends)]
        return {
            **self._head(self.object), "choices": [c for part in found for c in part],
            "usage": self.usage(ended), **self._extras(ended[-1]),
        }  # fmt: skip

    async def _text(self, index: int, reply: Reply) -> tuple[dict[str, Any], Ended]:
        text, said = "", []
        async for part in reply.parts():
            if isinstance(part, Ended):
                break
            said += part.logprobs
            text += _content(part)
        assert isinstance(part, Ended)
        return self._made(index, reply, text, said, part.finish), part

    def _made(
        self, index: int, reply: Reply, text: str, said: list[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        ask = self.asks[index // self.asks[0].choices]
        logprobs = None
        if ask.top is not None:
            first = ask.ids[0] if ask.echo else None
            every = [*reply.prompt_logprobs, *said]
            logprobs = text_logprobs(self.service.tokenizer, every, first=first)
        if ask.echo:
            text = self.service.tokenizer.decode(ask.ids, skip_special=False) + text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    async def _pieces(
        self, index: int, reply: Reply
    ) -> AsyncIterator[tuple[dict[str, Any], int | None]]:
        ask = self.asks[index // self.asks[0].choices]
        has_echoed, at = not ask.echo, 0
        async for part in self._parts(reply):
            if isinstance(part, Progress):
                empty = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
                yield {**empty, "prompt_progress": _progress(part)}, None
                continue
            if isinstance(part, Ended):
                self.ended.append(part)
            if not has_echoed:
                has_echoed = True
                text = self.service.tokenizer.decode(ask.ids, skip_special=False)
                logprobs = None
                if ask.top is not None:
                    logprobs = text_logprobs(
                        self.service.tokenizer, reply.prompt_logprobs, first=ask.ids[0]
                    )
                reply.prompt_logprobs.clear()
                yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}, 0
                at = len(text)
            if isinstance(part, Ended):
                yield {
                    "index": index, "text": "", "logprobs": None, "finish_reason": part.finish,
                }, part.figures.new_tokens  # fmt: skip
                return
            text, logprobs = _content(part), None
            if ask.top is not None:
                logprobs = text_logprobs(self.service.tokenizer, part.logprobs, at)
            at += len(text)
            yield (
                {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None},
                part.tokens,
            )


def _written(choice: dict[str, Any]) -> msgspec.Raw:
    """Returns a choice as JSON, which takes a fraction of its memory where it has log-probabilities."""
    return msgspec.Raw(msgspec.json.encode(choice))


def _progress(part: Progress) -> dict[str, Any]:
    """Returns the progress of a prompt in llama.cpp's format."""
    return {
        "total": part.total, "cache": part.cached, "processed": part.computed, "time_ms": 1000 * part.seconds
    }  # fmt: skip


def _content(part: Part) -> str:
    return "".join(e.text for e in part.events if not isinstance(e, ToolCall))
