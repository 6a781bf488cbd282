"""Anthropic's own client against the server."""

from __future__ import annotations

from dataclasses import replace

import anthropic
import pytest

import edgemoe

ASK = [{"role": "user", "content": "Say it."}]
COLD = {"temperature": 0}  # the newest client has no such argument
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def text(tiny_moe):
    """The engine's own greedy reply of 40 tokens, and the length of its prompt."""
    with edgemoe.load(tiny_moe) as engine:
        ids = engine.tokenizer.encode(CHATML, add_special=False)
        params = replace(engine.sampling, temperature=0, max_tokens=40)
        return engine.tokenizer.decode(list(engine.generate(ids, params))), len(ids)


def test_messages_have_the_reply_of_the_engine_alone(client, text):
    done = client.messages.create(
        model="m", system="Be brief.", messages=ASK, max_tokens=40, extra_body=COLD
    )
    assert [block.type for block in done.content] == ["text"]
    assert done.content[0].text == text[0]
    assert done.stop_reason == "max_tokens"
    assert done.model == "tiny"
    usage = done.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == text[1]
    assert usage.output_tokens == 40


def test_a_stream_says_the_same(client, text):
    with client.messages.stream(
        model="m", system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Say it."}]}], max_tokens=40, extra_body=COLD,
    ) as stream:  # fmt: skip
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == text[0]
    assert final.usage.output_tokens == 40
    assert final.usage.cache_read_input_tokens == text[1] - 1


def test_a_stop_sequence_is_named(client, text):
    stop = text[0][20:22]
    done = client.messages.create(
        model="m",
        system="Be brief.",
        messages=ASK,
        max_tokens=40,
        extra_body=COLD,
        stop_sequences=[stop],
    )
    assert done.stop_reason == "stop_sequence"
    assert done.stop_sequence == stop
    assert done.content[0].text == text[0][: text[0].index(stop)]


def test_tokens_are_counted(client, text):
    done = client.messages.count_tokens(model="m", system="Be brief.", messages=ASK)
    assert done.input_tokens == text[1]


def test_conversations_with_tools_and_thinking_are_read(client, server):
    tools = [{"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}]
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a cat"}]},
            {"type": "text", "text": "Well?"},
        ]},
        {"role": "system", "content": "Mind the cat."},
    ]  # fmt: skip
    done = client.beta.messages.create(
        model="m", messages=messages, tools=[*tools, {"type": "web_search_20250305", "name": "web_search"}],
        max_tokens=2, betas=["x-1"], metadata={"user_id": "u"},
    )  # fmt: skip
    assert done.usage.output_tokens == 2
    assert {"metadata", "tools[1]: web_search_20250305"} <= set(done.edgemoe["ignored"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages: expected, and missing"),
        ({"messages": ASK}, "max_tokens: expected, and missing"),
        ({"messages": ASK, "max_tokens": "x"}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "only text"),
        ({"messages": [{"role": "user", "content": "x" * 600}], "max_tokens": 1}, "prompt is too long: "),
        ({"messages": ASK, "max_tokens": 1, "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": ASK, "max_tokens": 1, "tools": [{"name": "x"}]}, "tools[0]"),
        ({"messages": ASK, "max_tokens": 1, "system": [{"type": "image"}]}, "system[0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_dialect(server, body, words):
    done = server.post("/v1/messages?beta=true", body)
    assert done.status_code == 400
    assert done.json()["type"] == "error"
    assert done.json()["error"]["type"] == "invalid_request_error"
    message = done.json()["error"]["message"]
    assert words in message
    assert message.count(f"{words.partition(':')[0]}: ") < 2  # the field is named once


def test_other_errors_are_in_the_dialect_too(client, server):
    assert server.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    import httpx2

    assert httpx2.head(server.url + "/").status_code == 200
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="m", messages=[], max_tokens=1)
