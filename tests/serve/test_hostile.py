"""Clients that are slow, many or endless, and a full disk, do not disturb other clients."""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import signal
import socket
import time
from contextlib import ExitStack, suppress

import httpx2 as httpx
import psutil
import uvicorn
from served import running, started
from uvicorn.server import ServerState

import edgemoe.serve.server
from edgemoe.serve import connections

ASK = {"messages": [{"role": "user", "content": "Go."}], "max_tokens": 4, "temperature": 0}


def port_of(server):
    return int(server.url.rpartition(":")[2])


def connected(server, stack):
    raw = socket.create_connection(("127.0.0.1", port_of(server)), timeout=10)
    return stack.enter_context(raw)


def head(length, path="/v1/chat/completions"):
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def answer(raw):
    """Returns an answer's head and body; empty if the connection ends."""
    text = b""
    while b"\r\n\r\n" not in text:
        try:
            more = raw.recv(65536)
        except ConnectionError:
            more = b""
        if not more:
            return "", b""
        text += more
    head, _, body = text.partition(b"\r\n\r\n")
    length = next(
        int(h[16:]) for h in head.lower().splitlines() if h.startswith(b"content-length: ")
    )
    while len(body) < length:
        body += raw.recv(65536)
    return head.decode(), body


def is_fine(server):
    return server.post("/v1/chat/completions", ASK).status_code == 200


def test_a_head_that_does_not_end_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    with ExitStack() as stack:
        late = connected(server, stack)
        late.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        quiet = connected(server, stack)
        assert is_fine(server)
        assert late.recv(100) == quiet.recv(100) == b""
        again = connected(server, stack)  # the second head on one connection
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(again)[1] == b'{"status":"ok"}'
        again.sendall(b"GET /heal")
        assert again.recv(100) == b""


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    with ExitStack() as stack:
        for path, kind in (("/v1/chat/completions", "error"), ("/v1/messages", "type")):
            raw = connected(server, stack)
            raw.sendall(head(500, path) + b'{"messages"')
            status, body = answer(raw)
            assert " 408 " in status
            assert kind in json.loads(body)


def test_who_does_not_read_holds_up_nobody(server):
    """The reply is longer than the socket's buffers, and complete when it is finally read."""
    body = json.dumps({
        **ASK, "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20,
        "n": 2, "seed": 1,
    }).encode()  # fmt: skip
    with ExitStack() as stack:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stack.enter_context(raw).connect(("127.0.0.1", port_of(server)))
        raw.settimeout(20)
        raw.sendall(head(len(body)) + body)
        raw.recv(1)
        assert is_fine(server)
        text = b""
        while b"[DONE]" not in text[-200:]:
            text += raw.recv(1 << 20)
    assert text.count(b'"finish_reason":"length"') == 2
    server.settle()


def test_who_never_reads_is_left(server, monkeypatch):
    monkeypatch.setattr(connections, "TAKING", 0.2)
    body = json.dumps({
        **ASK, "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8,
    }).encode()  # fmt: skip
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", port_of(server)))
        raw.settimeout(20)
        raw.sendall(head(len(body)) + body)
        raw.recv(1)
        here, end = raw.getsockname(), time.monotonic() + 20
        while any(c.raddr == here for c in psutil.Process().net_connections("tcp4")):
            assert time.monotonic() < end
            time.sleep(0.01)
        text = b""
        with suppress(ConnectionError):
            while more := raw.recv(1 << 20):
                text += more
    assert text.startswith(b"TTP/1.1 200")
    assert b"[DONE]" not in text


def test_two_hundred_connections_are_answered(server):
    with ExitStack() as stack:
        body = json.dumps({**ASK, "max_tokens": 1}).encode()
        many = [connected(server, stack) for _ in range(200)]
        for raw in many[::4]:
            raw.sendall(head(len(body)) + body)
        assert server.get("/health").status_code == 200
        heads = [answer(raw)[0] for raw in many[::4]]
    assert {head.split()[1] for head in heads} == {"200"}
    server.settle()
    assert is_fine(server)


def test_other_machines_have_so_many_connections_each(tiny_moe, caplog):
    with running(tiny_moe, host="0.0.0.0", no_auth=True) as server, ExitStack() as stack:
        many = [connected(server, stack) for _ in range(70)]
        for raw in many:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        bodies = [answer(raw)[1] for raw in many]
        assert bodies == [b'{"status":"ok"}'] * 64 + [b""] * 6
        for raw in many:
            raw.close()
        end = time.monotonic() + 10
        while True:  # until the server has seen that they are gone
            try:
                assert is_fine(server)
                break
            except httpx.HTTPError:
                assert time.monotonic() < end
    assert caplog.text.count("127.0.0.1 has 64 connections; further ones are closed") == 1


def test_all_together_have_so_many_connections(tiny_moe, monkeypatch, caplog):
    monkeypatch.setattr(edgemoe.serve.server, "_TOGETHER", 9)
    with running(tiny_moe, queue=0) as server, ExitStack() as stack:
        many = [connected(server, stack) for _ in range(12)]
        for raw in many[:9]:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(raw)[1] == b'{"status":"ok"}'
        assert [raw.recv(100) for raw in many[9:]] == [b""] * 3
    assert caplog.text.count("this server has 9 connections; further ones are closed") == 1


def test_no_more_of_a_body_is_read_than_is_asked_for():
    sizes = []

    async def app(scope, receive, send):
        is_whole = False
        while not is_whole:
            await asyncio.sleep(0.001)  # in which all of it could come
            message = await receive()
            sizes.append(len(message["body"]))
            is_whole = not message["more_body"]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def asked():
        config = uvicorn.Config(
            app, http=connections.connections(0, 1), lifespan="off", log_config=None
        )
        config.load()
        state = ServerState()
        made = functools.partial(
            config.http_protocol_class, config=config, server_state=state, app_state={}
        )
        async with await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0) as door:
            reader, writer = await asyncio.open_connection(*door.sockets[0].getsockname())
            for _ in range(2):  # the second on the same connection
                writer.write(head(300_000) + b"x" * 300_000)
                assert b" 204 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            writer.close()

    asyncio.run(asked())
    assert sum(sizes) == 600_000
    assert max(sizes) <= connections.PART


def test_a_disk_that_is_full_costs_prefixes_alone(tiny_moe, tmp_path):
    """A limit on file size stands in for a full disk: the kernel refuses to write beyond it."""
    flags = (
        "--port",
        "0",
        "--ram",
        "600MiB",
        "-np",
        "1",
        "--slot-save-path",
        str(tmp_path / "kept"),
    )
    process, port = started(str(tiny_moe), *flags)
    url = f"http://127.0.0.1:{port}"
    try:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        hashes = []
        for text in ("a" * 300, "b" * 300, "a" * 300):
            ask = {**ASK, "messages": [{"role": "user", "content": text}]}
            done = httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=30).json()
            hashes.append(done["edgemoe"]["logits_hash"])
            assert done["usage"]["prompt_tokens_details"]["cached_tokens"] < 64
        assert hashes[0] == hashes[2]
        done = httpx.post(f"{url}/slots/0?action=save", json={"filename": "x"}, timeout=30)
        assert done.status_code == 500
        assert "File too large" in done.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(15) == 0
        assert said.count("is not saved") == 1
        assert not list((tmp_path / "kept").iterdir())
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
