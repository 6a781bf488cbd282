"""The server itself: whom it answers, clients that leave, failures, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx2 as httpx
import pytest
from served import running, started
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.errors import FormatError
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.serve import messages, openai, responses
from edgemoe.serve.ask import Wanted
from edgemoe.serve.loading import Loading
from edgemoe.serve.preparing import converse
from edgemoe.serve.prompts import Conversation
from edgemoe.serve.server import listen
from edgemoe.serve.service import Service
from edgemoe.serve.settings import Settings


def chat(text="Say it.", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:9", 200), ("localhost", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200), ("box.lan:80", 200),
        ("evil.com", 403), ("evil.com:8080", 403), ("127.0.0.1.evil.com", 403), ("192.168.0.7", 403), ("", 403),
    ],
)  # fmt: skip
def test_only_its_own_names_are_answered(guarded, host, code):
    done = guarded.get("/health", headers={"Host": host})
    assert done.status_code == code


@pytest.fixture(scope="module")
def guarded(tiny_moe):
    with running(
        tiny_moe,
        keys=("sesame", "open"),
        hosts=("box.lan",),
        origins=("http://page.test",),
        queue=1,
        is_strict=True,
    ) as found:
        yield found


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 401), ({"Authorization": "Bearer"}, 401), ({"Authorization": "Bearer sesam"}, 401),
        ({"Authorization": "Basic sesame"}, 401), ({"x-api-key": "nope"}, 401),
        ({"Authorization": "Bearer sesame"}, 200), ({"Authorization": "bearer open"}, 200),
        ({"x-api-key": "sesame"}, 200),
    ],
)  # fmt: skip
def test_a_key_is_needed_for_all_but_health(guarded, headers, code):
    assert guarded.get("/v1/models", headers=headers).status_code == code
    assert guarded.get("/health", headers=headers).status_code == 200


def test_only_named_pages_may_ask(guarded, server):
    key = {"x-api-key": "sesame"}
    good = guarded.get("/v1/models", headers={**key, "Origin": "http://page.test"})
    assert good.headers["access-control-allow-origin"] == "http://page.test"
    bad = guarded.get("/v1/models", headers={**key, "Origin": "http://other.test"})
    assert "access-control-allow-origin" not in bad.headers
    none = server.get("/v1/models", headers={"Origin": "http://page.test"})
    assert "access-control-allow-origin" not in none.headers
    assert none.headers["x-content-type-options"] == "nosniff"


MARKED = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
RESULT = [{"type": "tool_result", "tool_use_id": "a", "content": MARKED}]
CHATS, CLAUDE, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
COUNT, TEMPLATE = "/v1/messages/count_tokens", "/apply-template"
LOOSE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}
"""A schema that no grammar can see to."""
FUNCTION = {"type": "function", "function": {"name": "f"}}
ASKED = {"role": "user", "content": "x"}
CALLING = {"role": "assistant", "tool_calls": [{"id": "a", "x": 1, **FUNCTION}]}
RETURNED = {"role": "tool", "tool_call_id": "a", "content": "x"}


def strict(schema):
    return {"name": "f", "parameters": schema, "strict": True}


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (CHATS, chat(user="x"), "user"), (CHATS, chat(MARKED), "cache_control"),
        (CHATS, chat(tools=[{"type": "x"}]), "tools[0]"),
        (CHATS, chat(stream_options={"include_x": True}), "stream_options.include_x"),
        ("/v1/completions", {"prompt": "x", "user": "x"}, "user"),
        (CLAUDE, chat(MARKED), "cache_control"), (CLAUDE, chat(RESULT), "cache_control"),
        (CLAUDE, chat(tools=[{"type": "web_search_20250305"}]), "tools[0]"),
        (CLAUDE, chat(thinking={"type": "enabled", "display": "omitted"}), "thinking.display"),
        (CHATS, chat(thinking={"type": "enabled", "display": "omitted"}), "thinking.display"),
        (CHATS, chat(tools=[{"type": "function", "function": strict(LOOSE)}]), "tools[0].function.strict"),
        (CLAUDE, chat(), "anthropic-beta"), (COUNT, chat(top_k=1), "top_k"), (COUNT, chat(), "anthropic-beta"),
        (CLAUDE, chat(tools=[{"name": "f", "input_schema": LOOSE, "strict": True}]), "tools[0].strict"),
        (RESPONSES, {"input": "x", "reasoning": {"summary": "auto"}}, "reasoning.summary"),
        (RESPONSES, {"input": "x", "text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"input": "x", "top_logprobs": 1}, "top_logprobs"),
        (RESPONSES, {"input": "x", "truncation": "auto"}, "truncation"),
        (RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", **strict(LOOSE)}]}, "tools[0].strict"),
        (RESPONSES, {"input": "x", "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ("/tokenize", {"content": "x", "parse_special": True}, "parse_special"),
        ("/detokenize", {"tokens": [65], "x": 1}, "x"), (TEMPLATE, chat(x=1), "x"),
        (TEMPLATE, chat(tools=[{"type": "x"}]), "tools[0]"),
        (CHATS, {"messages": [{"role": "user", "content": "x", "x": 1}]}, "messages.x"),
        (CHATS, chat([{"type": "text", "text": "x", "x": 1}]), "messages.x"),
        (CHATS, {"messages": [CALLING, RETURNED]}, "messages.x"),
        (CHATS, chat(stream_options={"include_usage": True}), "stream_options"),
        (CHATS, chat(timings_per_token=True), "timings_per_token"),
        ("/v1/completions", {"prompt": "x", "return_progress": True}, "return_progress"),
        (TEMPLATE, chat([{"type": "text", "text": "x", "x": 1}]), "messages.x"),
        (CLAUDE, chat([{"type": "text", "text": "x", "citations": ["x"]}]), "messages.citations"),
        (CLAUDE, chat([{"type": "tool_result", "tool_use_id": "a", "is_error": True}]), "messages.is_error"),
        (CLAUDE, chat([{"type": "redacted_thinking", "data": "x"}]), "redacted_thinking"),
        (CLAUDE, chat(system=[{"type": "text", "text": "x", "x": 1}]), "system.x"),
        (RESPONSES, {"input": [ASKED, {"type": "reasoning", "encrypted_content": "x"}]}, "input.encrypted_content"),
        (CHATS, chat(tools=[FUNCTION | {"x": 1}]), "tools[0].x"),
        (CHATS, chat(tools=[FUNCTION, FUNCTION | {"function": {"name": "g", "x": 1}}]), "tools[1].function.x"),
        (CHATS, chat(tools=[FUNCTION | {"cache_control": {}}]), "cache_control"),
        (TEMPLATE, chat(tools=[FUNCTION | {"x": 1}]), "tools[0].x"),
        (CLAUDE, chat(tools=[{"name": "f", "input_schema": {}, "defer_loading": True}]), "tools[0].defer_loading"),
        (COUNT, chat(tools=[{"name": "f", "input_schema": {}, "parameters": LOOSE}]), "tools[0].parameters"),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "f", "x": 1}]}, "tools[0].x"),
    ],
)  # fmt: skip
def test_strict_servers_refuse_what_has_no_effect(guarded, server, path, body, name):
    headers = {"x-api-key": "open"} | ({name: "x"} if name == "anthropic-beta" else {})
    if path in (CHATS, CLAUDE):
        body = {**body, "max_tokens": 1}
    done = guarded.post(path, body, headers=headers)
    assert done.status_code == 400
    message = done.json()["error"]["message"]
    assert message == f"{name}: has no effect here, and --strict refuses what has none"
    assert server.post(path, body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": LOOSE}}])),
        (CLAUDE, chat(tools=[{"name": "f", "input_schema": LOOSE}])),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": LOOSE}]}),
    ],
)  # fmt: skip
def test_a_reply_says_that_calls_are_not_kept_to_a_schema(server, path, body):
    body = {**body, "max_output_tokens" if path == RESPONSES else "max_tokens": 1}
    done = server.post(path, body).json()
    (note,) = done["edgemoe"]["notes"]
    assert note.startswith("calls are not kept to the schemas of their tools: tools[0].function.pa")


ALTERNATING = """{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ message['content'] }}{% endfor %}"""


def test_a_reply_says_that_messages_were_reworded(tmp_path):
    checkpoint = tiny_checkpoint()
    config = json.loads(checkpoint.files["tokenizer_config.json"]) | {"chat_template": ALTERNATING}
    checkpoint.files["tokenizer_config.json"] = json.dumps(config).encode()
    convert(checkpoint, tmp_path / "x.moe")
    with running(tmp_path / "x.moe") as server:
        twice = {"messages": [ASKED, ASKED], "max_tokens": 1}
        how = "neighbours of one role are one message"
        for path in (CHATS, CLAUDE):
            said = server.post(path, twice).json()["edgemoe"]["notes"]
            assert said == [f"messages were reworded for the model's template: {how}"]
        assert "notes" not in server.post(CHATS, chat(max_tokens=1)).json()["edgemoe"]


def test_names_without_effect_that_are_many_or_long_are_cut(server):
    tools = [FUNCTION | {"x": 1}, {"type": "function", "function": {"name": "g"}, "x": 1}]
    tools += [{"type": f"{i}" * 1000} for i in range(100)]
    done = server.post(CHATS, chat(max_tokens=1, tools=tools, **{"y" * 1000: 1}))
    ignored = done.json()["edgemoe"]["ignored"]
    assert len(ignored) == 33
    assert ignored[-1] == "70 more fields"
    assert max(map(len, ignored)) == 80
    assert ignored[0].startswith("yyy")
    assert ignored[1] == "tools[0].x"
    assert ignored[2].startswith("tools[2]: 000")
    assert server.service.log.since(0)[-1]["ignored"] == ignored


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, chat(tools=[{"type": "function", "function": strict({"type": "object"})}])),
        (CHATS, chat(tools=[FUNCTION | {"x": False, "y": None}])),
        (CHATS, {"messages": [ASKED | {"annotations": [], "audio": None, "function_call": None}]}),
        (CHATS, chat(tools=[{"type": "function", "function": strict(LOOSE)}], tool_choice="none")),
        (CHATS, chat(tools=[{"type": "function", "function": {**strict(LOOSE), "strict": False}}])),
        (CHATS, chat(thinking={"type": "enabled", "budget_tokens": 9})),
        (RESPONSES, {"input": "x", "stream_options": {"include_obfuscation": False}}),
    ],
)  # fmt: skip
def test_strict_servers_take_what_is_honoured(guarded, path, body):
    more = {"max_tokens": 1} if path == CHATS else {}
    done = guarded.post(path, {**body, **more}, headers={"x-api-key": "open"})
    assert done.status_code == 200, done.text


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (openai.read_chat, chat("marked", tools=[{"type": "function", "function": {"name": "marked"}}])),
        (openai.read_chat, chat("x", chat_template_kwargs={"a": "marked"}, guided_choice=["marked"])),
        (openai.read_completion, {"prompt": "marked", "response_format": {"type": "text", "x": "marked"}}),
        (messages.read_messages, chat("marked", system="marked", max_tokens=1)),
        (responses.read_responses, {"input": "marked"}),
    ],
)  # fmt: skip
def test_what_was_read_is_not_kept_for_the_answer(server, read, body):
    request, _ = server.service.desk.read(read, server.service, json.dumps(body).encode())
    assert "marked" not in str(request)


def test_names_without_effect_are_kept_short(server):
    names = {f"{i:02}" + "n" * 1000: 1 for i in range(100)}
    done = server.post("/v1/chat/completions", chat("x", max_tokens=1, **names)).json()
    ignored = done["edgemoe"]["ignored"]
    assert ignored == [f"{i:02}" + "n" * 78 for i in range(32)] + ["68 more fields"]
    assert ignored in [entry.get("ignored") for entry in server.service.log.since(0)]
    text = server.get("/metrics").text
    assert "n" * 79 not in text
    done = server.post("/v1/completions", {"prompt": ["x"] * 4097})
    assert "prompt: expected at most 4096, got 4097" in done.text


def test_other_machines_need_a_key():
    with pytest.raises(ValueError, match="lets other machines in"):
        Settings(host="0.0.0.0")
    for more in ({"keys": ("k",)}, {"no_auth": True}):
        settings = Settings(host="0.0.0.0", **more)
        assert settings.takes_host("10.0.0.3:8080")  # an address cannot be rebound by DNS
        assert not settings.takes_host("evil.com:8080")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"keys": ("k",), "no_auth": True}, "--no-auth: expected no key beside it"),
        ({"hosts": ("http://box",)}, "--allowed-hosts: expected a name or an address without a port"),
        ({"hosts": ("box:8080",)}, "--allowed-hosts: .* got 'box:8080'"),
        ({"origins": ("box",)}, r"--cors-origins: expected one like http://localhost:3000, or \*, got"),
        ({"origins": ("http://box/",)}, "--cors-origins: .* got 'http://box/'"),
        ({"aliases": (" ",)}, "--alias: expected a name"),
    ],
)  # fmt: skip
def test_what_no_client_could_match_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        Settings(**more)
    Settings(hosts=("box", "a_b.corp.", "::1", "10.0.0.1"), aliases=("m",))
    Settings(origins=("*", "null", "http://box:3000", "chrome-extension://abc"))


def test_a_host_is_the_same_in_every_spelling():
    settings = Settings(hosts=("2001:DB8:0::A", "Box.LAN"), host="FE80:0::1", no_auth=True)
    for header in ("[2001:db8::a]:80", "[2001:0DB8::A]", "box.lan", "BOX.lan:1", "[fe80::1]:8080"):
        assert settings.takes_host(header)
    assert not settings.takes_host("[2001:db8::b]:80")


def test_a_body_is_not_taken_without_end(server):
    done = httpx.post(server.url + "/v1/chat/completions", content=b"x" * (17 << 20), timeout=30)
    assert done.status_code == 413
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")  # before any of the body came


def test_a_long_name_is_not_said_back_in_full(server):
    done = server.get("/" + "a" * 12_000)
    assert done.status_code == 404
    assert len(done.content) < 500


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * (1 << 20),
        b"\x16\x03\x01 hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    ],
)
def test_half_and_broken_requests_harm_nobody(server, head):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        try:
            raw.sendall(head)
            raw.settimeout(0.2)
            raw.recv(65536)
        except OSError:
            pass
    assert server.get("/health").status_code == 200


def expected(path, bodies):
    """Returns the replies that an engine alone gives to some chats."""
    with edgemoe.load(path) as engine:
        texts = []
        for body in bodies:
            ids = engine.tokenizer.encode_chat(body["messages"])
            params = replace(engine.sampling, seed=body["seed"], max_tokens=body["max_tokens"])
            texts.append(engine.tokenizer.decode(list(engine.generate(ids, params))))
    return texts


def test_replies_are_right_whoever_else_asks_and_leaves(tiny_moe, server):
    rng = random.Random(1)
    bodies = [
        chat("".join(rng.choices("abcdefgh ", k=rng.randrange(5, 200))), seed=i, max_tokens=rng.randrange(1, 40))
        for i in range(60)
    ]  # fmt: skip
    texts = expected(tiny_moe, bodies)
    threads = threading.active_count()

    async def ask(client, i):
        body = bodies[i]
        if i % 2:
            done = await client.post("/v1/chat/completions", json=body)
            return done.json()["choices"][0]["message"]["content"]
        text = ""
        async with client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}
        ) as done:
            async for line in done.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    async def everyone():
        eight = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def one(i):
                async with eight:
                    patience = rng.random() * 0.05 if rng.random() < 0.4 else 60
                    with contextlib.suppress(asyncio.TimeoutError):
                        return await asyncio.wait_for(ask(client, i), patience)

            return await asyncio.gather(*map(one, range(len(bodies))))

    got = asyncio.run(everyone())
    assert sum(text is not None for text in got) > 20
    for text, right in zip(got, texts, strict=True):
        assert text in (None, right)
    server.settle()
    assert not any(slot["is_processing"] for slot in server.get("/slots").json())
    assert threading.active_count() <= threads + 8  # threads that read requests stay


def test_two_users_in_turns_keep_their_prefixes(server):
    server.settle()
    talks, before = [[{"role": "user", "content": c * 60}] for c in "xy"], [0, 0]
    for turn in range(3):
        for i, talk in enumerate(talks):
            body = {"messages": talk, "max_tokens": 8, "seed": 1}
            usage = server.post("/v1/chat/completions", body).json()["usage"]
            if turn:
                assert usage["prompt_tokens_details"]["cached_tokens"] >= 0.95 * before[i]
            before[i] = usage["prompt_tokens"]
            talk += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]


def test_who_leaves_in_a_prompt_makes_room(server):
    server.settle()
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions",
        json=chat("z" * 400, stream=True, ignore_eos=True), timeout=30,
    ) as done:  # fmt: skip
        next(done.iter_lines())
    server.settle()
    assert server.post("/v1/chat/completions", chat(max_tokens=2)).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(tiny_moe):
    with running(tiny_moe, timeout=0.02) as server:
        done = server.post("/v1/chat/completions", chat(ignore_eos=True))
        assert done.status_code == 503
        assert done.json()["error"]["code"] == "cancelled"
        (entry,) = server.service.log.since(0)
        assert (entry["status"], entry["end"]) == (503, "cancelled")


def test_a_full_queue_says_when_to_come_again(tiny_moe):
    with running(tiny_moe, queue=0) as server:
        done = server.post("/v1/chat/completions", chat())
        assert done.status_code == 429
        assert int(done.headers["retry-after"]) >= 1
        assert done.json()["error"]["type"] == "rate_limit"
        assert [entry["status"] for entry in server.service.log.since(0)] == [429]


def test_a_lost_engine_ends_the_server_with_a_code(tiny_moe):
    with running(tiny_moe) as server:
        server.service.batcher.step = lambda: 1 / 0
        done = None
        with contextlib.suppress(httpx.HTTPError):
            done = server.post("/v1/chat/completions", chat())
        assert done is None or done.status_code in (500, 503)
        server.thread.join(10)
        assert server.code == 1


async def asked(opened, settings):
    """Returns a service that has answered a chat."""
    service = Service(opened, settings, name="x", sampling=opened.text.sampling)
    talk = Conversation(chat("y" * 100)["messages"], [])
    ask = converse(service, talk, Wanted(sampling={"max_tokens": 2}))
    async for _ in service.begin(ask).parts():
        pass
    return service


def test_a_trace_that_cannot_be_written_costs_no_profile(tiny_moe, tmp_path):
    profile = tmp_path / "learned.profile"
    opened = open_model(tiny_moe, EngineOptions(trace="/dev/full", profile=profile))
    service = asyncio.run(asked(opened, Settings()))
    with pytest.raises(OSError, match="No space left"):
        service.close()
    assert profile.stat().st_size > 0


def test_what_cannot_be_learned_costs_no_prefix_and_no_trace(tiny_moe, tmp_path, monkeypatch):
    options = EngineOptions(trace=str(tmp_path / "trace"), profile=tmp_path / "learned.profile")
    opened = open_model(tiny_moe, options)
    service = asyncio.run(asked(opened, Settings(prefixes=str(tmp_path / "kept"))))
    monkeypatch.setattr(opened.model.scheduler, "state", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        service.close()
    assert list((tmp_path / "kept").iterdir())
    assert (tmp_path / "trace").stat().st_size > 0


def test_a_failed_read_is_one_failed_request(tmp_path, caplog):
    from tiny import tiny_checkpoint

    from edgemoe.convert.convert import convert

    path = tmp_path / "deep.moe"
    convert(tiny_checkpoint(layers=3), path)
    whole = path.read_bytes()
    with running(path) as server:
        with open(path, "r+b") as file:
            file.truncate(len(whole) // 2)
        done = server.post("/v1/chat/completions", chat(max_tokens=4, seed=1))
        assert done.status_code == 500
        message = done.json()["error"]["message"]
        assert str(path) in message
        assert f"a request failed: {message}" in caplog.text  # the log has it too
        (entry,) = server.service.log.since(0)  # once
        assert (entry["status"], entry["end"]) == (500, "error")
        stream = server.post("/v1/chat/completions", chat(max_tokens=4, seed=1, stream=True))
        last = [line for line in stream.text.splitlines() if line.startswith("data:")][-1]
        assert json.loads(last[5:])["error"]["type"] == "server_error"
        ask = {"input": "Go.", "stream": True, "seed": 1}
        lines = server.post("/v1/responses", ask).text.splitlines()
        events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.failed"
        with open(path, "r+b") as file:
            file.write(whole)
        assert server.post("/v1/chat/completions", chat(max_tokens=4, seed=1)).status_code == 200


def test_a_model_without_tokenizer_is_refused(tmp_path):
    from tiny import tiny_checkpoint

    from edgemoe.convert.convert import convert

    checkpoint = tiny_checkpoint()
    checkpoint.files = {}
    convert(checkpoint, tmp_path / "bare.moe")
    opened = open_model(tmp_path / "bare.moe", EngineOptions())
    with pytest.raises(FormatError, match="no tokenizer"):
        Service(opened, Settings(), name="x", sampling=opened.text.sampling)


def test_the_program_serves_and_ends_when_told(tiny_moe):
    process, port = started(str(tiny_moe), "--port", "0", "--ram", "600MiB", "--alias", "small")
    url = f"http://127.0.0.1:{port}"
    try:
        done = httpx.post(f"{url}/v1/chat/completions", json=chat(max_tokens=3), timeout=30).json()
        assert done["model"] == "small"
        taken = subprocess.run(
            [sys.executable, "-m", "edgemoe.cli.serve", str(tiny_moe), "--port", str(port)],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert taken.returncode == 1
        assert f"port {port} of 127.0.0.1" in taken.stderr
        assert "is free" in taken.stderr
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json=chat(max_tokens=300, stream=True, ignore_eos=True),
            timeout=30,
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text  # running requests may finish
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_a_second_signal_does_not_wait(tiny_moe):
    process, port = started(str(tiny_moe), "--port", "0", "--ram", "600MiB")
    try:
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            )
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "lets other machines in"), (["--port", "70000"], "--port"),
        (["--queue", "-1"], "--queue"), (["--temp", "-1"], "temperature"), (["--timeout", "0"], "--timeout"),
        (["--warm"], "--profile"), (["--slot-save-size", "1GiB"], "--slot-save-path"), (["--frob"], "--frob"),
        (["--no-grammar", "--reasoning-budget", "9"], "--reasoning-budget"),
        (["--ram", "90MiB"], "MiB for the server itself"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line(tiny_moe, flags, words, capsys):
    from edgemoe.cli.serve import main

    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main([str(tiny_moe), "--port", "0", *flags]))
    assert caught.value.code in (1, 2)
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_conversations_outlive_the_server(tiny_moe, tmp_path):
    body, said = chat("y" * 100, max_tokens=6, seed=1), []
    for cached in (False, True):
        with running(tiny_moe, prefixes=str(tmp_path / "kept")) as server:
            said.append(server.post("/v1/chat/completions", body).json())
        usage = said[-1]["usage"]
        kept = usage["prompt_tokens"] - 1 if cached else 0
        assert usage["prompt_tokens_details"]["cached_tokens"] == kept
    assert said[0]["choices"] == said[1]["choices"]
    assert said[0]["edgemoe"]["logits_hash"] == said[1]["edgemoe"]["logits_hash"]


def test_who_comes_while_the_model_loads_is_told(tiny_moe):
    settings = Settings(port=0)
    with listen(settings) as door, Loading(door, settings) as loading:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        health = httpx.get(f"{url}/health")
        error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        said = {"status": "loading model", "error": error}  # in llama.cpp's old and new form
        assert (health.status_code, health.json()) == (503, said)
        shares: list[float] = []
        open_model(tiny_moe, EngineOptions(), told=shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1
        for share in (0.0, 0.25, 1.0):
            loading.tell(share)
            assert httpx.get(f"{url}/health").json() == {**said, "progress": share}
        assert int(health.headers["retry-after"]) >= 1
        done = httpx.post(f"{url}/v1/messages", json=chat("x" * 100_000))
        assert done.status_code == 503
        assert done.json()["error"]["type"] == "overloaded_error"
        assert httpx.post(f"{url}/v1/chat/completions", json=chat()).json()["error"]["message"]
        assert httpx.get(f"{url}/health", headers={"Host": "evil.com"}).status_code == 403
        loading.close()
        with socket.create_connection(door.getsockname()):  # now clients wait, and are not refused
            taken, _ = door.accept()
            taken.close()
