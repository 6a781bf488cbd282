"""OpenAI's Responses API, by OpenAI's own client."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_response_says_what_a_chat_says(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
    chat = client.chat.completions.create(
        model="m", messages=messages, temperature=0, max_tokens=30
    )
    done = client.responses.create(
        model="m", instructions="Be brief.", input="Say it.", temperature=0, max_output_tokens=30
    )
    assert done.output_text == chat.choices[0].message.content
    assert done.status == "incomplete"
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage.output_tokens == 30
    assert done.usage.input_tokens == chat.usage.prompt_tokens


def test_a_stream_comes_to_the_same(client):
    ask = {"model": "m", "input": "Say it.", "temperature": 0, "max_output_tokens": 30}
    done = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        events = list(stream)
    assert events[-1].response.output_text == done.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip


def test_what_agents_send_is_read(client):
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "A"}]},
        {"role": "user", "content": "Look."},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{\"at\": 1}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a cat"},
    ]  # fmt: skip
    tools = [
        {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False},
        {"type": "web_search"}, {"type": "namespace", "name": "x"},
    ]  # fmt: skip
    done = client.responses.create(
        model="m", input=items, tools=tools, store=False, include=["reasoning.encrypted_content"],
        prompt_cache_key="k", max_output_tokens=2, reasoning={"effort": "low", "summary": "auto"},
        parallel_tool_calls=False, tool_choice="auto",
    )  # fmt: skip
    assert {
        "include", "prompt_cache_key", "store", "reasoning.summary", "tools[1]: web_search", "tools[2]: namespace",
    } <= set(done.edgemoe["ignored"])  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "r"}, "previous_response_id"), ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"), ({"input": []}, "messages"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"text": {"format": {"type": "x"}}}, "text.format"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"), ({"temperature": -1}, "temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(server, more, param):
    done = server.post("/v1/responses", {"input": "Say it.", "model": "m", **more})
    assert done.status_code == 400
    assert done.json()["error"]["param"] == param
