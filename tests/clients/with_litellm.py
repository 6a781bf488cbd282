"""litellm: both of its providers for servers of this kind, whole and streamed, and JSON."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches a list of prices
import litellm

ASK = [{"role": "user", "content": "What is the capital of France?"}]
for provider in ("openai", "hosted_vllm"):
    given = {
        "model": f"{provider}/demo",
        "api_base": f"{sys.argv[1]}/v1",
        "api_key": "none",
        "temperature": 0,
    }
    done = litellm.completion(messages=ASK, max_tokens=24, **given)
    assert "Paris" in done.choices[0].message.content
    assert done.usage.prompt_tokens > 5
    parts = list(litellm.completion(messages=ASK, max_tokens=24, stream=True, **given))
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == done.choices[0].message.content
    form = {"type": "json_object"}
    made = litellm.completion(
        messages=ASK, max_tokens=60, response_format=form, stop=["}"], **given
    )
    assert made.choices[0].message.content.lstrip().startswith("{")
try:
    litellm.completion(messages=[{"role": "user", "content": "x " * 9000}], **given)
except litellm.ContextWindowExceededError as error:
    assert "maximum context length" in str(error)
else:
    raise SystemExit("a prompt that is too long: expected ContextWindowExceededError")
tools = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
]
called = litellm.completion(messages=ASK, tools=tools, tool_choice="required", **given)
(call,) = called.choices[0].message.tool_calls[:1]
assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
