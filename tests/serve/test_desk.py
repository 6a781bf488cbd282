"""What is read takes no more memory than `--ram` leaves, whoever sends it."""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
from served import running, started

from edgemoe.runtime.batching import Batcher
from edgemoe.serve.desk import AT_HAND
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


def peak(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def test_large_requests_do_not_take_the_server_over_its_budget(tiny_moe):
    ram = smallest(tiny_moe) + 2
    process, port = started(str(tiny_moe), "--port", "0", "--ram", f"{ram}MiB")
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(4) as many:
            assert client.post("/v1/chat/completions", json=chat("Go.", max_tokens=8)).is_success
            for path, body, status in LARGE:
                done = client.post(path, json=body)
                assert done.status_code == status, (path, done.text)
            for done in many.map(lambda one: client.post(one[0], json=one[1]), LARGE[2:6]):
                assert done.status_code == 413
                assert "MiB more memory than --ram leaves" in done.text
            assert client.post("/v1/chat/completions", json=chat("Go.")).is_success
        assert peak(process) <= ram * MIB
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_large_requests_are_read_where_there_is_room(tiny_moe):
    with running(tiny_moe, options={"ram": "1GiB", "whole_process": True}) as server:
        before = server.service.model.room._left()
        said = [server.post(path, body).status_code for path, body, _ in LARGE]
        assert said == [400, 400, 200, 200, 400, 400, 200]
        prompt = server.post("/apply-template", chat(WORDS)).json()["prompt"]
        assert WORDS in prompt
        assert server.post("/v1/chat/completions", chat("Go.")).status_code == 200
        assert server.service.desk._borrowed == server.service.model.room._borrowed == 0
        assert abs(server.service.model.room._left() - before) < AT_HAND


def test_small_requests_are_read_while_a_pass_runs(server, monkeypatch):
    monkeypatch.delattr(Batcher, "borrow")
    done = server.post("/apply-template", chat("a word, " * 2000))
    assert done.status_code == 200, done.text


class Body(bytearray):
    """A body of which a weak reference can be held."""


def test_a_refused_body_is_freed_at_once(tiny_moe):
    with running(tiny_moe, options={"ram": "1GiB", "whole_process": True}) as server:
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
