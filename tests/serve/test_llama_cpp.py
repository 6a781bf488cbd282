"""What llama.cpp's clients use beyond OpenAI's API: choosing sequences, progress, timings."""

from __future__ import annotations

import errno
import json
import math
import os
import time

import httpx2 as httpx
import pytest
from served import running

from edgemoe.serve.settings import seconds

LONG = {"prompt": list(range(3, 203)), "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def saving(tiny_moe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with running(tiny_moe, prefixes=str(folder), pool_bytes=1 << 20) as found:
        found.folder = folder
        yield found


def act(server, action, name="x.bin", slot=1):
    return server.post(f"/slots/{slot}?action={action}", {"filename": name})


def cached(server, **more):
    done = server.post("/v1/completions", {**LONG, **more}).json()
    return done["usage"]["prompt_tokens_details"]["cached_tokens"], done["edgemoe"]["logits_hash"]


def test_a_sequence_is_saved_erased_and_restored_by_name(saving):
    _, right = cached(saving, id_slot=1)
    saved = act(saving, "save").json()
    path = saving.folder / "x.bin"
    assert saved["n_saved"] == 201
    assert saved["n_written"] == path.stat().st_size
    assert saved["timings"]["save_ms"] > 0
    assert path.stat().st_mode & 0o077 == 0
    assert act(saving, "erase").json() == {"id_slot": 1, "n_erased": 201}
    assert saving.get("/slots").json()[1]["n_held"] == 0
    restored = act(saving, "restore").json()
    assert (restored["n_restored"], restored["n_read"]) == (201, path.stat().st_size)
    assert restored["filename"] == "x.bin"
    assert cached(saving, id_slot=1) == (199, right)
    act(saving, "erase")
    act(saving, "restore", slot=2)
    assert cached(saving, id_slot=2) == (199, right)
    assert cached(saving, id_slot=2, cache_prompt=False) == (0, right)


@pytest.mark.parametrize(
    ("action", "name", "slot", "param"),
    [
        ("save", "../x", 0, "filename"), ("save", ".x", 0, "filename"), ("save", "x.prefix", 0, "filename"),
        ("save", "", 0, "filename"), ("restore", "none", 0, "filename"), ("save", "x", 4, "id_slot"),
        ("shake", "x", 0, "action"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(saving, action, name, slot, param):
    done = act(saving, action, name, slot)
    assert done.status_code == 400
    assert done.json()["error"]["param"] == param
    assert str(saving.folder) not in done.text


def test_an_empty_sequence_is_not_saved_and_a_damaged_one_not_restored(saving):
    act(saving, "erase", slot=3)
    done = act(saving, "save", slot=3)
    assert done.status_code == 400
    assert done.json()["error"]["message"] == "filename: sequence 3 holds no conversation to save"
    cached(saving, id_slot=0)
    act(saving, "save", "y", slot=0)
    path = saving.folder / "y"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    done = act(saving, "restore", "y", slot=0)
    assert done.status_code == 400
    assert "checksum" in done.json()["error"]["message"]
    assert cached(saving, id_slot=0)[0] == 0
    path.write_bytes(data[:100])
    assert act(saving, "restore", "y", slot=0).status_code == 400


def test_a_full_disk_is_said(saving, monkeypatch):
    import edgemoe.runtime.prefix_store as prefix_store

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    cached(saving, id_slot=0)
    monkeypatch.setattr(prefix_store, "write_summed", full)
    done = act(saving, "save", "z", slot=0)
    assert done.status_code == 500
    assert "No space left" in done.json()["error"]["message"]
    assert not os.path.exists(saving.folder / "z")


def test_without_a_folder_there_are_none(server):
    assert act(server, "save").status_code == 501


def test_what_is_kept_is_told(saving):
    for i in range(6):
        saving.post("/v1/completions", {**LONG, "prompt": [i + 3] * 100})
    memory = saving.get("/props").json()["edgemoe"]["prefixes"]["memory"]
    assert memory["count"] > 0
    assert 0 < memory["bytes"] <= memory["most"] == 1 << 20
    lines = saving.get("/metrics").text.splitlines()
    assert f'edgemoe_ram_bytes{{part="prefixes"}} {memory["bytes"]}' in lines
    assert f'edgemoe_prefixes{{place="memory"}} {memory["count"]}' in lines
    assert 'edgemoe_prefixes{place="disk"} 0' in lines


def test_a_sequence_that_there_is_not_is_refused(server):
    done = server.post("/v1/completions", {**LONG, "id_slot": 4})
    assert done.json()["error"]["param"] == "id_slot"
    assert server.post("/v1/completions", {**LONG, "id_slot": -1}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_progress_and_timings_come_with_a_stream(server, path):
    text = "x" * 300
    body = {
        "messages": [{"role": "user", "content": text}], "prompt": text, "stream": True, "max_tokens": 5,
        "return_progress": True, "timings_per_token": True, "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip
    body.pop("prompt" if "chat" in path else "messages")
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as done:
        lines = "".join(done.iter_text()).splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    progress = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
    assert progress
    assert all(p["total"] >= 300 and p["cache"] == 0 for p in progress)
    assert [p["processed"] for p in progress] == sorted(p["processed"] for p in progress)
    timings = [c["timings"] for c in chunks if "timings" in c]
    assert timings[-1]["predicted_n"] == 5
    assert timings[-1]["prompt_n"] == progress[0]["total"]
    assert timings[0]["prompt_ms"] > 0
    assert all("prompt_progress" not in c["choices"][0] for c in chunks)


def test_experts_leave_memory_when_nobody_asks(tiny_moe):
    """The states of conversations stay, and replies are the same."""
    with running(tiny_moe) as server:
        _, right = cached(server)
        store = server.opened.model.store
        assert server.get("/props").json()["is_sleeping"] is False
        held = store.stats["resident_bytes"]
        server.post("/v1/completions", {**LONG, "prompt": [9], "keep_alive": "20ms"})
        while not server.get("/props").json()["is_sleeping"]:
            pass
        assert store.cache.stats["resident_bytes"] < held / 2
        assert cached(server, keep_alive=-1) == (199, right)
        assert server.get("/props").json()["is_sleeping"] is False
        assert server.post("/v1/completions", {**LONG, "keep_alive": "soon"}).status_code == 400


def test_experts_leave_memory_when_nobody_has_asked_yet(tiny_moe):
    """They may be there, from `--warm`."""
    with running(tiny_moe, keep_alive=0.02) as server:
        end = time.monotonic() + 20
        while not server.get("/props").json()["is_sleeping"]:
            assert time.monotonic() < end
        assert cached(server)[0] == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("5m", 300), ("30s", 30), ("1.5h", 5400), ("7", 7), ("-1", math.inf), ("0", 0)],
)
def test_times_are_read(text, value):
    assert seconds(text) == value
