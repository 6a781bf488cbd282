"""Rebuilds tokenizer.json, tokenizer_config.json and generation_config.json from a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from edgemoe.convert.gguf.tokenizer.bpe import byte_level, gemma
from edgemoe.convert.gguf.tokenizer.sentencepiece import sentencepiece
from edgemoe.convert.gguf.tokenizer.tokens import (
    Tokens,
    added_tokens,
    end_tokens,
    first_token,
    special_tokens,
    strings,
)
from edgemoe.errors import FormatError, quoted

__all__ = ["KINDS", "end_tokens", "tokenizer_files"]

KINDS: Mapping[str, Callable[[Mapping[str, Any], Tokens, str], tuple[dict[str, Any], bool]]] = {
    "gpt2": byte_level,
    "llama": sentencepiece,
    "gemma4": gemma,
}
"""Builders of the parts of tokenizer.json that depend on the kind, by `tokenizer.ggml.model`.

They also return whether a text begins with the first (BOS) token, if the file does not say.
"""
_NONE = (None, "none", "no_vocab")


def tokenizer_files(
    meta: Mapping[str, Any], *, context_length: int, where: str
) -> dict[str, bytes]:
    """Builds the files of a tokenizer, by name; those of the tokenizer only if the GGUF file has one.

    Args:
        meta: the GGUF file's metadata by key.
        context_length: the `model_max_length` of tokenizer_config.json.
        where: the file's name, for messages.

    Raises:
        FormatError: the kind of tokenizer is not supported, or its tables contradict each other.
    """
    files: dict[str, dict[str, Any]] = {}
    kind = meta.get("tokenizer.ggml.model")
    if kind not in _NONE:
        files |= _tokenizer(meta, kind, context_length, where)
    if sampling := _sampling(meta):
        files["generation_config.json"] = sampling
    return {name: json.dumps(content).encode() for name, content in files.items()}


def _tokenizer(
    meta: Mapping[str, Any], kind: Any, context_length: int, where: str
) -> dict[str, dict[str, Any]]:
    parts_of = KINDS.get(kind) if isinstance(kind, str) else None
    if parts_of is None:
        raise FormatError(
            f"{where}: tokenizer {quoted(kind)} is not supported in GGUF; supported: {', '.join(KINDS)}"
        )
    tokens = strings(meta, "tokenizer.ggml.tokens", where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError(f"{where}: tokenizer.ggml.tokens holds the same token twice")
    parts, adds_first = parts_of(meta, tokens, where)
    special = special_tokens(meta, tokens, where)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **special,
    }
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(meta, tokens, where),
        "post_processor": first_token(meta, vocab, special.get("bos_token"), default=adds_first),
        **parts,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


_SAMPLING = {
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "repeat_last_n",
}
"""Names of sampling settings in GGUF files whose names in generation_config.json differ, and the latter."""


def _sampling(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of `general.sampling.*`; readers of generation_config.json say which they honour."""
    start = "general.sampling."
    found = {key.removeprefix(start): value for key, value in meta.items() if key.startswith(start)}
    # The window last, after the penalty that it belongs to.
    found = dict(sorted(found.items(), key=lambda item: item[0] == "penalty_last_n"))
    return {_SAMPLING.get(name, name): value for name, value in found.items()}
