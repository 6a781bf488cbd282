"""A reply on its way to a client that reads more slowly than the model writes."""

from __future__ import annotations

import asyncio
import time
from array import array
from types import SimpleNamespace

from edgemoe.runtime.requests import Outcome
from edgemoe.serve import reply as module
from edgemoe.serve.ask import Ask
from edgemoe.serve.reply import Ended, Part, Reply
from edgemoe.text.sampler import SamplingParams

TOKENS = [ord("a") + i % 26 for i in range(1500)]


def test_a_client_that_is_behind_gets_more_at_a_time(server, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", 0.001)
    service = server.service
    ask = Ask(ids=array("i", [1]), params=SamplingParams(), is_raw=True)

    async def sent():
        reply = Reply(ask, 0, service.tokenizer, service.reading, lambda _: None, streams=True)
        parts = reply.parts()

        def write(tokens):
            for i, token in enumerate(tokens):
                assert reply.take(token, None)
                if i % 30 == 0:
                    time.sleep(0.002)

        await asyncio.to_thread(write, TOKENS[:1000])
        found = [await anext(parts)]
        await asyncio.to_thread(write, TOKENS[1000:])
        while reply._fresh:
            await asyncio.sleep(0.001)
        assert reply._parts.qsize() == 1
        assert len(reply._made) <= 2 * module._APART
        reply.end(Outcome("length", SimpleNamespace()))
        return found + [part async for part in parts]

    *parts, last = asyncio.run(sent())
    assert isinstance(last, Ended)
    assert len(parts) <= 3  # what came first, what came until that was taken, and the rest
    text = ""
    for part in parts:
        assert isinstance(part, Part)
        (piece,) = part.events
        text += piece.text
    assert text == service.tokenizer.decode(TOKENS)
    assert [part.tokens for part in parts][-1] == 1500
