"""Byte-level BPE (`gpt2`), and BPE over whole texts with a fallback to byte tokens (`gemma4`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.convert.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from edgemoe.convert.gguf.tokenizer.tokens import Tokens, strings
from edgemoe.errors import FormatError, quoted

__all__ = ["byte_level", "gemma"]

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_SPACE = "▁"  # stands for a space in tokens


def byte_level(meta: Mapping[str, Any], tokens: Tokens, where: str) -> tuple[dict[str, Any], bool]:
    """Returns the parts of tokenizer.json that depend on the kind, and whether texts begin with BOS by default.

    Raises:
        FormatError: the pre-tokenizer is unknown, or a merge has parts or a result that are not tokens.
    """
    pre = meta.get("tokenizer.ggml.pre")
    known = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if known is None:
        raise FormatError(
            f"{where}: pre-tokenizer {quoted(pre)} is not supported in GGUF; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    cuts = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in known.cuts
    ]
    parts = {
        "normalizer": {"type": "NFC"} if known.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, _BYTE_LEVEL]},
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        "model": _model(meta, tokens, where) | {"ignore_merges": known.ignore_merges},
    }
    return parts, known.adds_bos


def gemma(meta: Mapping[str, Any], tokens: Tokens, where: str) -> tuple[dict[str, Any], bool]:
    """Returns the same for Gemma's kind of tokenizer."""
    parts = {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _model(meta, tokens, where)
        | {"byte_fallback": True, "fuse_unk": True, "unk_token": _unknown(meta, tokens)},
    }
    return parts, True


def _unknown(meta: Mapping[str, Any], tokens: Tokens) -> str | None:
    index = meta.get("tokenizer.ggml.unknown_token_id")
    return tokens[index] if type(index) is int and 0 <= index < len(tokens) else None


def _model(meta: Mapping[str, Any], tokens: Tokens, where: str) -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in strings(meta, "tokenizer.ggml.merges", where)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise FormatError(
                f"{where}: merge {quoted(' '.join(merge))} does not fit the vocabulary"
            )
    return {
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
    }
