"""OpenAI's own client against the server, and the server's errors for wrong requests."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx2 as httpx
import openai
import pytest
from served import running
from tiny import tiny_checkpoint

import edgemoe

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def engine(tiny_moe):
    with edgemoe.load(tiny_moe) as found:
        yield found


def alone(engine, prompt, **how):
    """Returns the reply that an engine alone gives to a text."""
    ids = engine.tokenizer.encode(prompt, add_special=False)
    params = replace(engine.sampling, **how)
    tokens = list(engine.generate(ids, params))
    return engine.tokenizer.decode(tokens), engine.stats.logits_hash, len(ids)


def test_a_chat_has_the_reply_of_the_engine_alone(client, engine):
    done = client.chat.completions.create(model="any", messages=ASK, seed=7, max_tokens=40)
    text, logits_hash, length = alone(engine, CHATML, seed=7, max_tokens=40)
    assert done.choices[0].message.content == text
    assert done.choices[0].finish_reason == "length"
    assert done.model == "tiny"
    assert done.edgemoe["logits_hash"] == logits_hash
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (length, 40)
    again = client.chat.completions.create(model="any", messages=ASK, seed=7, max_tokens=40)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens == length - 1
    assert again.system_fingerprint == done.system_fingerprint


def test_a_stream_says_the_same(client, engine):
    text, _, length = alone(engine, CHATML, seed=6, max_tokens=30, temperature=1.5)
    with client.chat.completions.create(
        model="any", messages=ASK, seed=6, max_completion_tokens=30, temperature=1.5, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == length
    assert len({(c.id, c.created) for c in chunks}) == 1


def test_several_choices_come_from_seeds_in_a_row(client, engine):
    done = client.chat.completions.create(model="any", messages=ASK, seed=20, max_tokens=12, n=3)
    assert [c.index for c in done.choices] == [0, 1, 2]
    for i, choice in enumerate(done.choices):
        assert choice.message.content == alone(engine, CHATML, seed=20 + i, max_tokens=12)[0]
    assert done.usage.completion_tokens == 36


def test_a_stop_text_ends_a_reply_and_is_not_in_it(client, engine):
    text, *_ = alone(engine, CHATML, seed=7, max_tokens=40)
    stop = text[20:22]
    done = client.chat.completions.create(
        model="m", messages=ASK, seed=7, max_tokens=40, stop=[stop]
    )
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content == text[: text.index(stop)]


def test_max_tokens_is_clamped_to_the_room(client, server):
    done = client.chat.completions.create(
        model="m", messages=ASK, max_tokens=32000, extra_body={"ignore_eos": True}, seed=1
    )
    assert done.choices[0].finish_reason == "length"
    assert done.usage.total_tokens == server.service.context


def test_log_probabilities_of_chats_and_completions_agree(client):
    chat = client.chat.completions.create(
        model="m", messages=ASK, temperature=0, max_tokens=5, logprobs=True, top_logprobs=2
    )
    text = client.completions.create(
        model="m", prompt=CHATML, temperature=0, max_tokens=5, logprobs=2, echo=True
    )
    said = chat.choices[0].logprobs.content
    lists = text.choices[0].logprobs
    assert [x.logprob for x in said] == lists.token_logprobs[-5:]
    assert lists.token_logprobs[0] is None
    assert all(x.top_logprobs[0].logprob >= x.logprob for x in said)
    assert text.choices[0].text.startswith(CHATML)
    assert len(lists.tokens) == text.usage.total_tokens


def test_prompts_of_tokens_are_scored_like_the_engine_does(client, engine):
    from edgemoe.text.logprobs import log_softmax

    prompts = [[1, 2, 3, 70, 80, 200], [5, 6], [9] * 30]
    done = client.completions.create(
        model="m", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for ids, choice in zip(prompts, done.choices, strict=True):
        rows = log_softmax(engine.logits(ids))
        expected = [float(row[i]) for row, i in zip(rows, ids[1:], strict=False)]
        assert choice.logprobs.token_logprobs[1:-1] == expected


def test_completions_stream(client, engine):
    text, *_ = alone(engine, "abc", seed=3, max_tokens=9)
    with client.completions.create(
        model="m", prompt="abc", seed=3, max_tokens=9, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_fields_without_effect_are_reported(client, server):
    done = client.chat.completions.create(
        model="m", messages=ASK, max_tokens=1, user="someone", extra_body={"frobnicate": 1}
    )
    assert sorted(done.edgemoe["ignored"]) == ["frobnicate", "user"]
    text = server.get("/metrics").text
    assert 'edgemoe_ignored_fields_total{field="frobnicate"} 1' in text
    assert 'edgemoe_requests_total{route="/v1/chat/completions",code="200"}' in text
    held = [line for line in text.splitlines() if line.startswith("edgemoe_resident_experts{")]
    stats = server.opened.model.store.stats
    assert sum(float(line.split()[1]) for line in held) == stats["resident_experts"] > 0


WRONG = [
    ({}, "messages", "expected, and missing"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'king'"),
    ({"messages": [{"role": "user", "function_call": {"name": "f"}}]}, "messages[0].function_call", "say tool_calls"),
    ({"messages": [{"role": "user", "audio": {"id": "a"}}]}, "messages[0].audio", "text alone"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type",
     "image_url"),
    ({"messages": ASK, "temperature": -1}, "temperature", "0 or more"),
    ({"messages": ASK, "top_p": "x"}, "top_p", "float"),
    ({"messages": ASK, "top_p": 2}, "top_p", "0 to 1"),
    ({"messages": ASK, "n": 9}, "n", "1 to 8"),
    ({"messages": ASK, "stop": ["x"] * 17}, "stop", "at most 16"),
    ({"messages": ASK, "stop": [""]}, "stop", "none empty"),
    ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"messages": ASK, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias", "tokens"),
    ({"messages": ASK, "functions": []}, "functions", "tools"),
    ({"messages": ASK, "modalities": ["audio"]}, "modalities", "only text"),
    ({"messages": ASK, "tool_choice": "required"}, "tool_choice", "tools"),
    ({"messages": ASK, "response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"messages": ASK, "chat_template_kwargs": 5}, "chat_template_kwargs", "object"),
]  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("body", "param", "words"), WRONG)
def test_what_is_wrong_is_named(server, body, param, words, streams):
    done = server.post("/v1/chat/completions", {**body, "stream": streams})
    assert done.status_code == 400, done.text
    error = done.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": NaN}']
)
def test_what_is_no_json_object_is_refused(server, content):
    import httpx2

    done = httpx2.post(server.url + "/v1/chat/completions", content=content, timeout=30)
    assert done.status_code == 400
    assert done.json()["error"]["message"].startswith("body: expected")


def test_a_prompt_that_is_too_long_is_refused_in_known_words(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 600}])
    error = caught.value.body
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert error["n_ctx"] == server.service.context == 512
    assert error["n_prompt_tokens"] > 600
    assert "This model's maximum context length is 512 tokens" in error["message"]
    call = {
        "type": "function",
        "function": {"name": "write", "arguments": f'{{"x": "{"x" * 20_000}"}}'},
    }
    for message in (
        {"role": "user", "content": "x" * 20_000},
        {"role": "assistant", "tool_calls": [call]},
    ):
        far = server.post("/v1/chat/completions", {"messages": [*ASK, message]})
        assert far.json()["error"]["code"] == "context_length_exceeded"
    far = server.post("/v1/completions", {"prompt": "x" * 100_000}).json()["error"]
    assert far["code"] == "context_length_exceeded"
    assert 100_000 <= far["n_prompt_tokens"] <= 101_000
    assert "the prompt has about 100" in far["message"]


def test_models_and_the_rest_are_told(client, server):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.meta["n_ctx"] == 512
    checkpoint = tiny_checkpoint()
    assert model.meta["n_params"] == sum(t.size for t in checkpoint._tensors.values())
    assert httpx.head(server.url).status_code == 200  # some clients ask this first
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/props").json()["total_slots"] == 4
    assert len(server.get("/slots").json()) == 4
    ids = server.post("/tokenize", {"content": "hi<|im_end|>"}).json()["tokens"]
    assert ids[-1] == 258
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": "hi<|im_end|>"}
    assert server.post("/apply-template", {"messages": ASK}).json() == {"prompt": CHATML}
    assert server.post("/v1/embeddings", {}).status_code == 501
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.post("/slots/0?action=save", {}).status_code == 501


def test_a_text_without_tokens_of_its_own_is_tokenized(tiny_moe):
    from tokenizers import normalizers, processors

    with running(tiny_moe) as server:
        backend = server.service.tokenizer._backend
        backend.normalizer = normalizers.Strip()
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
        for text in ("", "  "):
            for special, ids in ((True, [256]), (False, [])):
                done = server.post("/tokenize", {"content": text, "add_special": special})
                assert done.json() == {"tokens": ids}


def test_roles_and_parts_become_what_the_template_knows(server):
    messages = [
        {"role": "developer", "content": "A"}, {"role": "system", "content": [{"type": "text", "text": "B"}]},
        {"role": "user", "content": [{"type": "text", "text": "C"}, {"type": "text", "text": "D"}]},
        {"role": "system", "content": "E"},
    ]  # fmt: skip
    prompt = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert prompt == (
        "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nC\nD<|im_end|>\n"
        "<|im_start|>system\nE<|im_end|>\n<|im_start|>assistant\n"
    )
    billing = [{"role": "system", "content": "x-anthropic-billing-header: cch=1"}, *messages]
    assert server.post("/apply-template", {"messages": billing}).json()["prompt"] == prompt


def test_an_event_stream_is_as_it_should_be(server):
    import httpx2

    body = {"messages": ASK, "max_tokens": 3, "stream": True, "seed": 1}
    with httpx2.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=30) as done:
        assert done.headers["content-type"].startswith("text/event-stream")
        assert done.headers["cache-control"] == "no-cache"
        assert done.headers["x-accel-buffering"] == "no"
        text = "".join(done.iter_text())
    events = [e for e in text.split("\n\n") if e]
    assert events[0].startswith(": ")
    assert events[-1] == "data: [DONE]"
    for event in events[1:-1]:
        if not event.startswith(":"):
            json.loads(event.removeprefix("data: "))
