"""Request bodies as programs send them: all of their fields, in the order sent, with short texts."""

from __future__ import annotations

PATH = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False,
    "properties": {"path": {"type": "string", "description": "Absolute path"}, "limit": {"type": "number"}},
    "required": ["path"],
}  # fmt: skip


def function(name):
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": PATH},
    }


def user(text):
    return {"role": "user", "content": text}


OPENCODE = {
    "model": "x", "max_tokens": 32000, "temperature": 0, "top_p": 1,
    "messages": [
        {"role": "system", "content": "You are a coding agent."}, {"role": "system", "content": "Environment: Linux."},
        user("Fix it."),
        {"role": "assistant", "content": "", "reasoning_content": "I look first.", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path":"a.py"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "grep", "arguments": '{"path":"."}'}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "x = 1"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "a.py:1"}]},
    ],
    "tools": [function(n) for n in ("read", "write", "bash", "grep")], "tool_choice": "auto", "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
TITLE = {
    "model": "x", "max_tokens": 8, "stream": True,
    "messages": [
        {"role": "system", "content": "A title, please."},
        user("Generate a title for this conversation:\n"), user([{"type": "text", "text": "Fix it."}]),
    ],
}  # fmt: skip
CODEX = {
    "model": "x", "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [
            {"type": "input_text", "text": "<permissions>"}, {"type": "input_text", "text": "<apps>"},
        ]},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<environment>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "I look first."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "phase": "commentary",
         "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "name": "shell", "call_id": "c1", "arguments": "{\"path\": \".\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {"type": "custom_tool_call", "id": "ct_1", "name": "apply_patch", "call_id": "c2", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "Done"},
        {"role": "user", "content": "Go on."},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": PATH},
        {"type": "namespace", "name": "agents", "description": "", "tools": [
            {"type": "function", "name": "spawn", "description": "", "strict": False, "parameters": PATH},
        ]},
        {"type": "custom", "name": "apply_patch", "description": "Edits.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: \"x\""}},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199-a",
    "text": {"verbosity": "low"}, "client_metadata": {"x-codex-installation-id": "b"},
}  # fmt: skip
CLAUDE = {
    "model": "claude-x",
    "messages": [
        user([
            {"type": "text", "text": "<system-reminder>"},
            {"type": "text", "text": "Fix it.", "cache_control": {"type": "ephemeral"}},
        ]),
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I look first.", "signature": "edgemoe"},
            {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a"}},
            {"type": "tool_use", "id": "toolu_2", "name": "Bash", "input": {}},
        ]},
        {"role": "system", "content": "The user opened a file."},
        user([
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "x = 1", "is_error": False},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no"}],
             "is_error": True, "cache_control": {"type": "ephemeral"}},
        ]),
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=abc"},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "tools": [
        *({"name": n, "description": f"{n}s.", "input_schema": PATH} for n in ("Read", "Write", "Bash")),
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "metadata": {"user_id": "u"},
    "max_tokens": 32000, "thinking": {"type": "adaptive"}, "temperature": 1,
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"}, "stream": True,
}  # fmt: skip
LM_EVAL = {
    "model": "x", "prompt": [[10, 20, 30], [40, 50]], "echo": True, "logprobs": 1, "max_tokens": 1,
    "temperature": 0, "seed": 1234,
}  # fmt: skip
GUIDELLM = {
    "model": "x", "messages": [user([{"type": "text", "text": "Go."}])], "stream": True, "ignore_eos": True,
    "max_completion_tokens": 4, "max_tokens": 4, "stop": None,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip

CHAT = {
    "messages": [user("b"), {"role": "assistant", "content": None, "refusal": None}, user("c")],
    "max_tokens": 3, "max_completion_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "typical_p": 0.9, "repeat_penalty": 1.1, "repeat_last_n": 5, "presence_penalty": 0.1, "frequency_penalty": 0.1,
    "seed": 1, "ignore_eos": True, "timings_per_token": True, "keep_alive": "5m", "stop": ["zz"], "n": 2,
    "stream_options": {"include_usage": True, "continuous_usage_stats": False}, "logit_bias": {"5": 1.0},
    "logprobs": True, "top_logprobs": 2, "tools": [function("read")], "parallel_tool_calls": True,
    "tool_choice": {"type": "function", "function": {"name": "read"}}, "reasoning_effort": "low", "think": True,
    "thinking": {"type": "enabled"}, "enable_thinking": True, "stream": False, "user": "u",
    "chat_template_kwargs": {"a": 1},
}  # fmt: skip
"""A chat request with every field that is honoured."""

_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
FORMS = [
    {"messages": [user("c")], **form}
    for form in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
        {"grammar": 'root ::= "a"'}, {"json_schema": {"type": "string"}}, {"guided_json": {"type": "string"}},
        {"guided_regex": "a+"}, {"guided_choice": ["a", "b"]}, {"guided_grammar": 'root ::= "a"'},
        {"structured_outputs": {"json": {}}}, {"structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"choice": ["a"]}}, {"structured_outputs": {"grammar": 'root ::= "a"'}},
    )
]  # fmt: skip
"""Chat requests with every way to prescribe the form of an answer."""
COMPLETION = {
    "prompt": ["a", [1, 2]], "max_tokens": 2, "logprobs": 2, "echo": True, "n": 1, "stop": "z", "suffix": "",
}  # fmt: skip
