"""If a device is lost while serving, waiting clients get an error, and the server exits with 1."""

from __future__ import annotations

import httpx2 as httpx
from served import Running
from simulated import configured, plug_in

BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


def test_a_device_that_is_lost_ends_the_server(tiny_moe, caplog):
    device = {"device": "cuda:0", "plug_in": plug_in(), "context": 64}
    server = Running(tiny_moe, options=device)
    try:
        assert server.post("/v1/chat/completions", BODY).status_code == 200
        with configured(lost=1):
            try:
                answer = server.post("/v1/chat/completions", BODY)
            except httpx.TransportError:
                pass  # the server ended before it could answer
            else:
                assert answer.status_code == 500
                assert "cuda:0 is lost" in answer.text
            server.thread.join(20)
            assert not server.thread.is_alive()
        assert server.code == 1
        assert "the engine's thread has ended: DeviceLost: cuda:0 is lost" in caplog.text
    finally:
        server.close()
