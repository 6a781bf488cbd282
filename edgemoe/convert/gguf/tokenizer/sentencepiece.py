"""SentencePiece's BPE (`llama`): tokens with scores, from which merges are derived as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.convert.gguf.tokenizer.tokens import Tokens
from edgemoe.errors import FormatError, quoted

__all__ = ["sentencepiece"]

_SPACE = "▁"
_NORMAL = 1  # one of llama.cpp's token types
_MOST_TRIED = 1 << 27  # characters in halves of tokens; 262144 tokens of 16 characters have 1 << 26


def sentencepiece(
    meta: Mapping[str, Any], tokens: Tokens, where: str
) -> tuple[dict[str, Any], bool]:
    """Returns the parts of tokenizer.json that depend on the kind, and whether texts begin with BOS by default.

    Raises:
        FormatError: a token lacks its score or its type, tokens are too long, or the unknown token is outside the
            vocabulary.
    """
    scores, kinds = (_numbers(meta, key, len(tokens), where) for key in ("scores", "token_type"))
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise FormatError(f"{where}: the unknown token {quoted(unknown)} is outside the vocabulary")
    prefixed = meta.get("tokenizer.ggml.add_space_prefix", True) is True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens, scores, kinds, where),
        },
    }
    return parts, True


def _numbers(meta: Mapping[str, Any], key: str, count: int, where: str) -> list[Any]:
    values = meta.get(f"tokenizer.ggml.{key}")
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(v) in (int, float) and v == v for v in values)  # not NaN
    ):
        raise FormatError(f"{where}: tokenizer.ggml.{key} must hold {count} numbers")
    return values


def _merges(tokens: Tokens, scores: list[float], kinds: list[int], where: str) -> list[list[str]]:
    """Returns every pair of normal tokens that concatenates to one, in order of descending score of the result."""
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _NORMAL
    }
    if sum(len(token) ** 2 for token in vocab) > _MOST_TRIED:
        raise FormatError(f"{where}: tokenizer.ggml.tokens are too long to find their merges")
    found = []
    for token, index in vocab.items():
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += sorted(
            (-scores[index], -len(left), -len(right), vocab[left], vocab[right], left, right)
            for left, right in halves
            if left in vocab and right in vocab
        )
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]
