"""Rebuilds tokenizer.json and tokenizer_config.json from a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgemoe.errors import FormatError, quoted

__all__ = ["tokenizer_files"]

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,  # GPT-2's regular expression
}
_DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
# By llama.cpp's name of the pre-tokenizer. Those of the second kind cut every digit off first.
_PRE_TOKENIZERS: Mapping[str, Mapping[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
}
_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's token types, those found in text before all others


def tokenizer_files(
    meta: Mapping[str, Any], *, context_length: int, where: str
) -> dict[str, bytes]:
    """Builds the two files of a byte-level BPE tokenizer.

    Args:
        meta: the GGUF file's metadata by key.
        context_length: goes into tokenizer_config.json.
        where: the file's name, for messages.

    Raises:
        FormatError: the tokenizer is of another kind, or its tables contradict each other.
    """
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise FormatError(
            f"{where}: tokenizer {quoted(model)} with pre-tokenizer {quoted(pre)} is not supported in GGUF; "
            f"supported: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    tokens = _strings(meta, "tokenizer.ggml.tokens", where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError(f"{where}: tokenizer.ggml.tokens holds the same token twice")
    merges = [merge.split(" ") for merge in _strings(meta, "tokenizer.ggml.merges", where)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise FormatError(
                f"{where}: merge {quoted(' '.join(merge))} does not fit the vocabulary"
            )
    special = _special_tokens(meta, tokens, where)
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(meta, tokens, where),
            "normalizer": None,
            "pre_tokenizer": _PRE_TOKENIZERS[pre],
            "post_processor": _post_processor(meta, vocab, special.get("bos_token")),
            "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
            **special,
        },
    }
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["tokenizer_config.json"]["chat_template"] = template
    if sampling := _sampling(meta):
        files["generation_config.json"] = sampling
    return {name: json.dumps(content).encode() for name, content in files.items()}


_SAMPLING = {
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "repeat_last_n",
}
"""Settings for sampling in GGUF files that are called something else in generation_config.json."""


def _sampling(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for sampling of `general.sampling.*`, all of them: readers say which they honour."""
    start = "general.sampling."
    found = {key.removeprefix(start): value for key, value in meta.items() if key.startswith(start)}
    # Last, as the window belongs to the penalty.
    found = dict(sorted(found.items(), key=lambda item: item[0] == "penalty_last_n"))
    return {_SAMPLING.get(name, name): value for name, value in found.items()}


def _strings(meta: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{where}: {key} must be a list of strings")
    return value


def _special_tokens(meta: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    """Returns those of bos_token, eos_token, unk_token and pad_token that the file names."""
    found = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise FormatError(f"{where}: the {key} token {quoted(index)} is outside the vocabulary")
        found[f"{role}_token"] = tokens[index]
    return found


def _added_tokens(meta: Mapping[str, Any], tokens: list[str], where: str) -> list[dict[str, Any]]:
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


def _post_processor(
    meta: Mapping[str, Any], vocab: Mapping[str, int], bos: str | None
) -> dict[str, Any] | None:
    """Returns what puts the first token before a text, or None where the file wants none."""
    if bos is None or meta.get("tokenizer.ggml.add_bos_token") is not True:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, *text],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }
