"""What is read takes no more memory than `--ram` leaves, whoever sends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from served import running, started

from edgemoe import hardware
from edgemoe.file.parse import parsed_bytes
from edgemoe.runtime.batching import Batcher
from edgemoe.runtime.model import Model
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.serve import about, bodies, openai, responses
from edgemoe.serve.completions import ChatAnswer, TextAnswer
from edgemoe.serve.desk import Desk
from edgemoe.serve.log import Asked
from edgemoe.serve.problems import Problem

MIB = 1 << 20
WORDS = "a word, " * (MIB // 16)


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


LARGE = (
    ("/tokenize", {"content": WORDS}, 400), ("/v1/completions", {"prompt": WORDS}, 400),
    ("/detokenize", {"tokens": [65] * (MIB // 4)}, 413), ("/apply-template", chat(4 * WORDS), 413),
    ("/v1/messages", chat(4 * WORDS), 413), ("/v1/responses", {"input": 4 * WORDS}, 413),
    ("/v1/chat/completions", chat("x", metadata=[[]] * (MIB // 4)), 413),
)  # fmt: skip


def smallest(path):
    """Asks the program itself; in MiB."""
    command = [sys.executable, "-m", "edgemoe.cli.serve", str(path), "--port", "0", "--ram", "1MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(re.search(r"smallest that works is (\d+) MiB", done.stderr)[1])


def roomy():
    """Returns the budget of a server with a GiB beside what this process took for other tests."""
    return {"ram": hardware.process_bytes() + 1024 * MIB, "whole_process": True}


def peak(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


@pytest.mark.parametrize("is_steady", [False, True])
def test_large_requests_do_not_take_the_server_over_its_budget(tiny_moe, tmp_path, is_steady):
    ram = smallest(tiny_moe) + 2
    more = ("--trace", str(tmp_path / "x.trace")) if is_steady else ()
    process, port = started(str(tiny_moe), "--port", "0", "--ram", f"{ram}MiB", *more)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as many:
            assert client.post("/v1/chat/completions", json=chat("Go.", max_tokens=8)).is_success
            for path, body, status in LARGE:
                done = client.post(path, json=body)
                assert done.status_code == status, (path, done.text)
            for done in many.map(lambda one: client.post(one[0], json=one[1]), 2 * LARGE[2:6]):
                if done.status_code == 503:  # it would fit without the others
                    assert int(done.headers["Retry-After"]) > 0
                else:
                    assert done.status_code == 413
                    assert "MiB more memory than --ram leaves" in done.text
            assert client.post("/v1/chat/completions", json=chat("Go.")).is_success
        assert peak(process) <= ram * MIB
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_more_memory_for_prefixes_than_is_left_is_said(tiny_moe):
    for size, count in (("2GiB", 1), ("1GiB", 0)):
        process, _ = started(
            str(tiny_moe), "--port", "0", "--ram", "2GiB", "--cache-ram", size, said=(said := [])
        )
        process.kill()
        process.stderr.close()
        process.wait()
        pattern = r"# --cache-ram: 1\.[6-9]\d* GiB for certain, as one expert and full contexts may need the rest\n"
        assert sum(bool(re.fullmatch(pattern, line)) for line in said) == count, said


def test_large_requests_are_read_where_there_is_room(tiny_moe):
    with running(tiny_moe, options=roomy()) as server:
        room = server.service.model.room
        assert server.post("/v1/chat/completions", chat("Go.", max_tokens=8)).status_code == 200
        before = room._base
        said = [server.post(path, body).status_code for path, body, _ in LARGE]
        assert said == [400, 400, 200, 200, 400, 400, 200]
        prompt = server.post("/apply-template", chat(WORDS)).json()["prompt"]
        assert WORDS in prompt
        assert server.post("/v1/chat/completions", chat("Go.")).status_code == 200
        assert server.service.desk._borrowed == server.service.model.room._borrowed == 0
        assert room._base - before < 16 * MIB  # all but what the allocator keeps has come back


def test_small_requests_are_read_while_a_pass_runs(server):
    is_read = threading.Event()
    busy = server.service.batcher.with_room(
        lambda _: is_read.wait(20)
    )  # as long as a pass may take
    done = server.post("/apply-template", chat("a word, " * 2000))
    is_read.set()
    assert busy.result(20)  # not before
    assert done.status_code == 200, done.text


@pytest.fixture
def batcher(tiny_moe):
    """A batcher that runs what waits for it only when it is told to, and has some 850 MiB to lend."""
    ram = hardware.process_bytes() + 900 * MIB
    found = open_model(tiny_moe, EngineOptions(ram=ram, whole_process=True))
    return Batcher(found.model, found.text.eos_ids)


def holding(desk, size):
    return asyncio.ensure_future(desk.hold(size, of=size))


async def settled(*tasks):
    await asyncio.wait(tasks, timeout=20)
    return tasks


def test_an_engine_that_ends_refuses_what_waits_for_room(batcher):
    desk = Desk(batcher)

    async def both():
        reading = asyncio.ensure_future(
            asyncio.to_thread(desk.read, lambda _, body: desk.need(64 * MIB), None, b"{}")
        )
        held = holding(desk, 64 * MIB)
        while len(batcher._errands) < 2:
            await asyncio.sleep(0)
        batcher.end(RuntimeError("over"))
        late = holding(desk, 64 * MIB)
        for task in await settled(reading, held, late):
            assert task.exception().status == 503

    asyncio.run(both())


def test_bodies_leave_what_is_there_for_the_request_that_is_read(batcher):
    desk, room = Desk(batcher), batcher._model.room

    async def held():
        slow = holding(desk, 400 * MIB)
        await asyncio.sleep(0)
        assert not slow.done()
        batcher.step()
        await slow
        assert room._borrowed >= 398 * MIB
        # Without a pass, as it has its own reserve.
        assert desk.read(lambda _, body: desk.need(12 * MIB) or body, None, b"{}") == b"{}"
        other, huge = holding(desk, 600 * MIB), holding(desk, 4096 * MIB)
        await asyncio.sleep(0)
        batcher.step()
        await settled(other, huge)
        assert (other.exception().status, other.exception().retry_after) == (503, 5)
        assert huge.exception().status == 413
        desk.release(400 * MIB)
        batcher.step()
        assert desk._held == desk._borrowed == room._borrowed == 0

    asyncio.run(held())


def test_requests_have_room_or_are_refused(batcher):
    desk = Desk(batcher)

    async def held():
        asked = [Asked() for _ in range(200)]
        coming = [asyncio.ensure_future(desk.admit(one)) for one in asked]
        for _ in range(4):
            await asyncio.sleep(0)
        at_once = sum(task.done() and task.exception() is None for task in coming)
        refused = [task.exception() for task in coming if task.done() and task.exception()]
        assert at_once == 2 * MIB // (24 << 10)  # without a pass
        assert len(refused) == 200 - at_once - 64
        assert {(error.status, error.retry_after) for error in refused} == {(503, 5)}
        batcher.step()
        await asyncio.wait(coming, timeout=20)
        assert sum(task.exception() is None for task in coming) == at_once + 64
        for one in asked:
            desk.release(one.held)
        batcher.step()
        assert desk._held == desk._borrowed == 0

    asyncio.run(held())


def test_one_that_gives_up_takes_nothing_from_one_that_asked_for_as_much(batcher):
    desk, room = Desk(batcher), batcher._model.room

    async def held():
        gone, stays, done = (holding(desk, 20 * MIB) for _ in range(3))
        await asyncio.sleep(0)
        gone.cancel()
        await settled(gone)
        assert not stays.done()  # nothing has been granted
        batcher.step()
        await settled(stays, done)
        assert desk._held == 40 * MIB
        assert room._borrowed == desk._borrowed == 38 * MIB
        late = holding(desk, 20 * MIB)
        await asyncio.sleep(0)
        batcher.step()
        late.cancel()  # too late: it was granted
        await settled(late)
        assert desk._held == 40 * MIB

    asyncio.run(held())


TEXTS = (
    "a",
    "\x01",
    "\u00e4",
    "\u0434",
    "\u4e2d",
    "\U0001f600",
    "a" * 1000 + "\U0001f600",
    "a\u4e2d",
)


@pytest.mark.parametrize("is_escaped", [False, True])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_take_no_more_than_is_granted_to_read_them(tiny_moe, text, is_escaped, monkeypatch):
    part = {"type": "text", "text": text * (2 * MIB // len(json.dumps(text)))}
    sent = {"messages": [{"role": "system", "content": [part, part]}] * 2}
    body = bytearray(json.dumps(sent, ensure_ascii=is_escaped).encode())
    with running(tiny_moe, options=roomy()) as server:
        desk, took = server.service.desk, []

        def need(size):
            took.append(tracemalloc.get_traced_memory()[1])
            raise Problem(400, "it is read")

        monkeypatch.setattr(desk, "need", need)
        tracemalloc.start()
        try:
            with pytest.raises(Problem, match="it is read"):
                desk.read(openai.read_chat, server.service, body)
        finally:
            tracemalloc.stop()
        granted = parsed_bytes(body)
        assert granted / 8 < took[0] < granted + MIB // 4


MANY = {format(i, "x"): 1 for i in range(20_000)}
MANY_FIELDS = (
    (openai.read_chat, {"messages": [{"role": "user", "content": "x", **MANY}]}),
    (openai.read_chat, chat("x", tools=[{"type": "function", "function": {"name": "f", **MANY}}])),
    (openai.read_chat, chat("x", stream_options=MANY)),
    (openai.read_chat, chat("x", chat_template_kwargs=MANY)),
    (openai.read_chat, chat("x", **MANY)),
    (openai.read_completion, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(20_000)}}),
    (responses.read_responses, {"input": [{"role": "user", "content": "x", **MANY}]}),
)  # fmt: skip


@pytest.mark.parametrize(("read", "sent"), MANY_FIELDS)
def test_many_fields_take_no_more_than_is_granted_to_read_them(server, read, sent, monkeypatch):
    desk, granted = server.service.desk, []

    def need(size):
        raise Problem(400, "expected no more")

    more = desk._more
    monkeypatch.setattr(desk, "need", need)
    monkeypatch.setattr(desk, "_more", lambda size: granted.append(size) or more(size))
    body = bytearray(json.dumps(sent, separators=(",", ":")).encode())
    tracemalloc.start()
    try:
        with pytest.raises(Problem, match="expected"):
            desk.read(read, server.service, body)
        assert tracemalloc.get_traced_memory()[1] < granted[0]
    finally:
        tracemalloc.stop()


TOOL = {"name": "f", "parameters": {"x": ["marked"] * 99}}
KEPT = (
    (openai.read_chat, chat("x", tools=[{"type": "function", "function": TOOL}]), MIB // 2),
    (openai.read_chat, chat("x", stop=["marked" * 100] * 16), 16 * 600),
    (openai.read_chat, chat("x", response_format={"type": "json_object"}), MIB // 2),
    (openai.read_completion, {"prompt": ["a word"] * 100, "max_tokens": 1}, 100 * 6 * 4),
    (openai.read_completion, {"prompt": ["a word"] * 100, "guided_json": {}}, MIB // 2),
    (openai.read_completion, {"prompt": ["a word"] * 100, "n": 8}, 800 << 10),
    (responses.read_responses, {"input": "x", "instructions": "a word " * 60}, 4 * 7 * 60),
    (about.tokenize, {"content": "a word", "with_pieces": True}, 6 * 4 * 184),
    (about.apply_template, {"messages": [{"role": "user", "content": "\x01" * 1000}]}, (1 + 2 * 6) * 1000),
)  # fmt: skip


@pytest.mark.parametrize(("read", "body", "least"), KEPT)
def test_what_a_request_keeps_has_its_memory_until_it_is_answered(server, read, body, least):
    asked, desk = Asked(), server.service.desk
    desk.read(read, server.service, json.dumps(body).encode(), asked)
    assert least < asked.held == desk._held < least + MIB // 2
    desk.release(asked.held)
    assert desk._held == desk._reads == 0


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("read", "path", "more"),
    [
        (openai.read_chat, "/v1/chat/completions", {**chat("x"), "logprobs": True, "top_logprobs": 20, "n": 2}),
        (openai.read_completion, "/v1/completions", {"prompt": ["a " * 60] * 3, "echo": True, "logprobs": 20}),
        (openai.read_completion, "/v1/completions", {"prompt": [*"aaaa", "a " * 220], "echo": True, "logprobs": 20}),
    ],
)  # fmt: skip
def test_log_probabilities_take_no_more_than_was_granted(server, read, path, more, streams):
    body = {**more, "max_tokens": 50, "stream": streams, "ignore_eos": True}
    asked, service = Asked(), server.service
    service.desk.read(read, service, json.dumps(body).encode(), asked)
    service.desk.release(asked.held)
    httpx.post(server.url + path, json=body)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        done = httpx.post(server.url + path, json=body, timeout=60)
        peak = tracemalloc.get_traced_memory()[1] - 2 * len(done.content)  # the client's
    finally:
        tracemalloc.stop()
    assert done.status_code == 200
    assert peak < asked.held + MIB
    assert streams or asked.held < 6 * peak


def test_log_probabilities_that_a_client_does_not_take_have_their_memory(server):
    asked, service = Asked(), server.service
    body = chat("x", logprobs=True, top_logprobs=20, max_tokens=400, ignore_eos=True, stream=True)
    said, ask = service.desk.read(openai.read_chat, service, json.dumps(body).encode(), asked)
    service.desk.release(asked.held)

    async def waiting():
        answer = ChatAnswer(service, said, [ask])
        while service.batcher.running() or service.batcher.waiting:
            await asyncio.sleep(0.01)
        took = tracemalloc.get_traced_memory()[0]
        assert len([one async for one in answer.events()]) > 3
        return took

    tracemalloc.start()
    try:
        assert MIB // 2 < asyncio.run(waiting()) < asked.held
    finally:
        tracemalloc.stop()


def test_memory_comes_back_when_an_answer_ends(server, monkeypatch):
    desk, body, held = server.service.desk, chat("x" * 100, stream=True), []
    forward = Model.forward
    monkeypatch.setattr(
        Model, "forward", lambda *of: held.append(desk._held) or forward(*of)
    )  # while it is answered
    for path in ("/v1/chat/completions", "/v1/messages"):
        for more in ({}, {"stream": False}):
            assert server.post(path, {**body, **more}).status_code == 200
        with httpx.stream("POST", server.url + path, json={**body, "max_tokens": 300}):
            pass  # the client leaves
        server.settle()
        assert server.post(path, {**body, "max_tokens": 10**6}).status_code == 200
    assert min(held) > 100 * 4
    end = time.monotonic() + 20
    while desk._held:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_that_a_client_does_not_read_keeps_its_memory(tiny_moe, reads):
    body = json.dumps(chat(WORDS)).encode()
    head = (
        f"POST /apply-template HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with running(tiny_moe, options=roomy()) as server, socket.socket() as client:
        desk = server.service.desk
        server.door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.connect(("127.0.0.1", server.door.getsockname()[1]))
        client.sendall(head.encode() + body)
        said = client.recv(1 << 10)
        assert said.startswith(b"HTTP/1.1 200")
        assert server.get("/health").status_code == 200  # later
        assert desk._held > len(WORDS)
        while reads and b'"}' not in said[-9:]:
            said += client.recv(1 << 16)
        assert not reads or said.count(b"a word, ") == len(WORDS) // 8
        client.close()
        end = time.monotonic() + 20
        while desk._held:
            assert time.monotonic() < end
            time.sleep(0.005)


def test_a_body_is_freed_though_errors_still_refer_to_it(server, monkeypatch):
    made = []

    class Seen(bytearray):
        def __init__(self):
            made.append(self)

    monkeypatch.setattr(bodies, "bytearray", Seen, raising=False)
    assert server.post("/v1/chat/completions", chat("x")).status_code == 200
    assert server.post("/v1/chat/completions", chat("x", n=9)).status_code == 400
    assert [len(body) for body in made] == [0, 0]


class Body(bytearray):
    """A body of which a weak reference can be held."""


def test_a_refused_body_is_freed_at_once(tiny_moe):
    with running(tiny_moe, options=roomy()) as server:
        service, body = server.service, Body(b"{}")
        kept = weakref.ref(body)
        gc.disable()
        try:
            with contextlib.suppress(Problem):
                service.desk.read(lambda service, _: service.desk.need(1 << 40), service, body)
                raise AssertionError("it was read")
            del body
            assert kept() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_keeps_no_replies_that_have_ended(server, streams):
    service = server.service
    body = {"prompt": ["a"] * 8, "n": 4, "max_tokens": 1, "stream": streams}
    said, asks = service.desk.read(openai.read_completion, service, json.dumps(body).encode())

    async def answered():
        answer = TextAnswer(service, said, asks)
        if not streams:
            await answer.whole()
            return len(answer.replies)
        return max([len(answer.replies) async for _ in answer.events()])

    assert asyncio.run(answered()) <= 2 * len(service.batcher.views)


def test_a_request_whose_grammar_has_no_room_is_refused_and_not_answered_without(
    server, monkeypatch
):
    def need(size):
        raise Problem(503, "other requests take the memory")

    monkeypatch.setattr(server.service.grammars, "_need", need)
    tool = {"name": "alone", "parameters": {"type": "object", "properties": {"new": {}}}}
    sent = chat("x", tools=[{"type": "function", "function": tool}])
    assert server.post("/v1/chat/completions", sent).status_code == 503
