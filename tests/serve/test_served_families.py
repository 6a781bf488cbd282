"""Models with more than keys and values as state give the replies they give alone: whole, streamed, two at once."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import families
import httpx2 as httpx
import pytest
from served import running
from tiny import tokenizer_files

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint

TEXTS = ("Hi there.", "Tell me of the sea, and of what is in it.")
SAID = {"temperature": 1.5, "seed": 5, "max_tokens": 24, "ignore_eos": True}


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe_lite", "gpt_oss"])
def test_a_family_is_served_as_it_answers_alone(name, tmp_path):
    folder = families.make(
        name, tmp_path / "hf", changes={"vocab_size": 320, "max_position_embeddings": 256}
    )
    for file, content in tokenizer_files().items():
        (folder / file).write_bytes(content)
    convert(open_checkpoint(folder), tmp_path / "tiny.moe")
    with edgemoe.load(tmp_path / "tiny.moe", threads=1) as engine:
        params = edgemoe.SamplingParams(**SAID)
        alone = ["".join(engine.chat(params=params).say(text)) for text in TEXTS]
    assert alone[0] != alone[1]
    options = {"sequences": 2, "threads": 1}
    with (
        running(tmp_path / "tiny.moe", options=options) as server,
        ThreadPoolExecutor(2) as two,
    ):
        assert [whole(server, text) for text in TEXTS] == alone
        assert [streamed(server, text) for text in TEXTS] == alone
        held = server.service.batcher.with_slot(0, lambda _: until_both_wait(server))
        assert list(two.map(lambda text: streamed(server, text), TEXTS)) == alone
        held.result()


def body(text, **more):
    return {"messages": [{"role": "user", "content": text}], **SAID, **more}


def whole(server, text):
    done = server.post("/v1/chat/completions", body(text)).json()
    return done["choices"][0]["message"]["content"]


def streamed(server, text):
    url = server.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body(text, stream=True), timeout=60) as done:
        chunks = [json.loads(x[6:]) for x in done.iter_lines() if x.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def until_both_wait(server):
    """Waits, between two passes, until both requests wait, so that the next pass has both."""
    end = time.monotonic() + 20
    while server.service.batcher.waiting < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
