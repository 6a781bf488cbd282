"""Forms and tool calls in the channels of gpt-oss, from a random model that knows nothing of them."""

from __future__ import annotations

import json

import pytest
from served import running
from tiny import tiny_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgemoe.convert.convert import convert
from edgemoe.text.calls import CHANNEL_MARKS

ASK = [{"role": "user", "content": "Go."}]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if tools %}{% endif %}<|start|>assistant{# <|channel|> #}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}, "required": ["at"],
        "additionalProperties": False}}}
    for name in ("look", "listen")
]  # fmt: skip
IDS = {mark: 256 + i for i, mark in enumerate(CHANNEL_MARKS)}
BYTES = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
OFTEN = {**dict.fromkeys(IDS.values(), 6), IDS["<|end|>"]: 8, BYTES["a"]: 6}
MARKED = {str(i): bias for i, bias in OFTEN.items()}
"""A logit bias with which channel marks come wherever they may, analysis too, and reasoning ends soon."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_checkpoint()
    checkpoint.config |= {
        "max_position_embeddings": 2048, "bos_token_id": IDS["<|start|>"],
        "eos_token_id": [IDS["<|return|>"], IDS["<|call|>"]],
    }  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CHANNEL_MARKS])
    config = {"eos_token": "<|return|>", "chat_template": TEMPLATE}
    checkpoint.files = {
        "tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()
    }  # fmt: skip
    path = tmp_path_factory.mktemp("channels") / "channels.moe"
    convert(checkpoint, path)
    with running(path) as found:
        yield found


def chat(server, **more):
    body = {"messages": ASK, "temperature": 2, "max_tokens": 300, "logit_bias": MARKED, **more}
    done = server.post("/v1/chat/completions", body)
    assert done.status_code == 200, done.text
    return done.json()["choices"][0], done.json()["usage"]


def test_a_form_begins_in_the_final_channel_and_reasoning_stays_free(server):
    thoughts = set()
    for seed in range(8):
        choice, _ = chat(server, seed=seed, json_schema={"enum": [1, "sky", {"a": []}]})
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]) in (1, "sky", {"a": []})
        thoughts.add(choice["message"].get("reasoning_content"))
    assert len(thoughts - {None}) > 1


@pytest.mark.parametrize("said", [{"guided_choice": ["up", "down"]}, {"grammar": 'root ::= "up"'}])
def test_so_do_the_other_forms(server, said):
    assert chat(server, seed=1, **said)[0]["message"]["content"] in ("up", "down")


@pytest.mark.parametrize("form", [{}, {"json_schema": {"const": "x"}}])
def test_reasoning_can_be_switched_off(server, form):
    for seed in range(3):
        choice, usage = chat(server, seed=seed, think=False, max_tokens=40, **form)
        assert "reasoning_content" not in choice["message"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_reasoning_is_bounded(server):
    """The model never ends reasoning by itself; the limit is set by Anthropic's budget_tokens."""
    body = {
        "messages": ASK, "max_tokens": 200, "thinking": {"type": "enabled", "budget_tokens": 12},
        "temperature": 1,
    }  # fmt: skip
    for _ in range(3):
        done = server.post("/v1/messages", body).json()
        thoughts = [b["thinking"] for b in done["content"] if b["type"] == "thinking"]
        assert all(len(t) <= 12 for t in thoughts)


def test_a_reply_says_that_its_reasoning_is_not_limited(server):
    loose = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": loose}}]
    body = {"messages": ASK, "max_tokens": 1, "tools": tools}
    for more in ({"think": False}, {}):
        done = server.post("/v1/chat/completions", {**body, **more}).json()
        said = [note.split(":")[0] for note in done["edgemoe"]["notes"]]
        assert said[0] == "calls are not kept to the schemas of their tools"
        assert said[1:] == ["the tokens of reasoning are not limited"] * ("think" in more)


def test_a_call_that_must_come_comes_after_free_reasoning(server):
    thoughts = set()
    for seed in range(8):
        choice, _ = chat(server, seed=seed, tools=TOOLS, tool_choice="required")
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in ("look", "listen")
        assert json.loads(call["function"]["arguments"])["at"] in ("sky", "sea")
        thoughts.add(choice["message"].get("reasoning_content"))
    assert len(thoughts - {None}) > 1


def test_a_call_of_its_own_is_whole(server):
    ends, bias = set(), {**MARKED, str(IDS["<|message|>"]): 0}
    bias |= {str(BYTES["c"]): 3, str(BYTES["Ġ"]): 4}  # commentary, and a recipient
    for seed in range(12):
        choice, _ = chat(server, seed=seed, tools=TOOLS, logit_bias=bias)
        ends.add(choice["finish_reason"])
        for call in choice["message"].get("tool_calls", ()):
            assert json.loads(call["function"]["arguments"])["at"] in ("sky", "sea")
    assert "tool_calls" in ends
    assert ends & {"stop", "length"}
