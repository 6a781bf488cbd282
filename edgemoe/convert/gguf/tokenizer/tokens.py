"""The parts that all kinds of tokenizers share in a GGUF file: tokens with types, and special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.errors import FormatError, quoted

__all__ = ["Tokens", "added_tokens", "end_tokens", "first_token", "special_tokens", "strings"]

_CONTROL, _USER_DEFINED = 3, 4  # the token types that llama.cpp matches in a text first

# Like llama.cpp, we recognise end tokens by their texts too: files name two or three, and models have more.
_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)

Tokens = list[str]


def strings(meta: Mapping[str, Any], key: str, where: str) -> list[str]:
    """Returns a list of strings; the key must exist."""
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{where}: {key} must be a list of strings")
    return value


def special_tokens(meta: Mapping[str, Any], tokens: Tokens, where: str) -> dict[str, str]:
    """Returns bos_token, eos_token, unk_token and pad_token, as far as the file names them."""
    found = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise FormatError(f"{where}: the {key} token {quoted(index)} is outside the vocabulary")
        found[f"{role}_token"] = tokens[index]
    return found


def end_tokens(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns bos_token_id, eos_token_id (a list if several tokens end a reply) and pad_token_id of config.json."""
    ids = {
        f"{role}_token_id": meta.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    tokens = meta.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    places = {token: i for i, token in enumerate(tokens) if token in _ENDS}
    if "<|return|>" in places and "<|call|>" in places:  # <|end|> then ends only a message
        places.pop("<|end|>", None)
    named = [ids["eos_token_id"]]
    named += [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    ends = list(dict.fromkeys(i for i in (*named, *places.values()) if i is not None))
    return {**ids, "eos_token_id": ends if len(ends) > 1 else ids["eos_token_id"]}


def added_tokens(meta: Mapping[str, Any], tokens: Tokens, where: str) -> list[dict[str, Any]]:
    """Returns the tokens that are matched in a text before all others, in the form of tokenizer.json."""
    kinds = meta.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise FormatError(f"{where}: tokenizer.ggml.token_type must hold {len(tokens)} numbers")
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def first_token(
    meta: Mapping[str, Any], vocab: Mapping[str, int], bos: str | None, *, default: bool
) -> dict[str, Any] | None:
    """Returns the post-processor that puts BOS before a text; None if the file wants none.

    Args:
        default: whether to add BOS if the file does not say.
    """
    if bos is None or meta.get("tokenizer.ggml.add_bos_token", default) is not True:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, *text],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }
