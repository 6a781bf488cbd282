"""GGUF metadata for the tokenizer in a `.moe` file, which must be byte-level BPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.convert.gguf.tokenizer import tokenizer_files
from edgemoe.convert.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from edgemoe.errors import FormatError, quoted
from edgemoe.file.format import MoeFile
from edgemoe.file.parse import parse_object

if TYPE_CHECKING:
    from edgemoe.text.tokenizer import Tokenizer

__all__ = ["tokenizer_metadata"]

_FILE, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_MOST = 64 << 20
_TEXT = (
    "I'll say: it's 1234567 years, 3.14 EUROS or so!?  Don't\tyou\n\n think so?  \n don'T\u3000\u4f60\u597d\uff0c"
    "\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0430\u0431\u0432 \u00e9\u00e8 na\u00efve "
    "caf\u00e9s __init__(self): return [x for x in y]  # ok\r\n HelloWorld camelCase ABCdef \U0001f600\U0001f680 "
    "1/2 a_b.c 0x1F4A9 e\u0301   end "
)
"""A text by which pre-tokenizers are told apart."""
_USUAL = ("qwen2", "llama-bpe", "gpt-2", "gpt-4o", "deepseek-v3")
"""Pre-tokenizers that are tried first, because less common ones split texts in the same way."""


def tokenizer_metadata(moe: MoeFile) -> dict[str, Any]:
    """Returns the tokenizer's metadata by key.

    Raises:
        FormatError: the kind of tokenizer cannot be exported, or its files are broken.
    """
    if _FILE not in moe.sections:
        return {"tokenizer.ggml.model": "none"}
    import tokenizers

    from edgemoe.text.tokenizer import Tokenizer

    content = parse_object(moe.sections[_FILE], f"{moe.path}: {_FILE}", most=_MOST)
    model = content.get("model") or {}
    if not isinstance(model, dict):
        raise FormatError(f"{moe.path}: {_FILE}: model must be an object, got {quoted(model)}")
    if (kind := _other_kind(model)) is not None:
        raise FormatError(
            f"{moe.path}: the tokenizer is {kind}, and only byte-level BPE can be exported to GGUF; a directory can "
            "hold it"
        )
    try:
        ours = Tokenizer.from_files(moe.sections)  # validates all that is used of its files
    except FormatError as error:
        raise FormatError(f"{moe.path}: {error}") from None
    out = {"tokenizer.ggml.model": "gpt2", **_tokens(moe, content), **_special(moe, ours)}
    theirs = tokenizers.Tokenizer.from_str(moe.sections[_FILE].decode())
    for name in (*_USUAL, *PRE_TOKENIZERS):
        if PRE_TOKENIZERS[name].ignore_merges != bool(model.get("ignore_merges")):
            continue
        files = tokenizer_files(
            {**out, "tokenizer.ggml.pre": name}, context_length=1, where=str(moe.path)
        )
        if _cut(tokenizers.Tokenizer.from_str(files[_FILE].decode())) == _cut(theirs):
            return {**out, "tokenizer.ggml.pre": name}
    raise FormatError(
        f"{moe.path}: no pre-tokenizer that llama.cpp knows cuts texts as this model's tokenizer does"
    )


def _other_kind(model: dict[str, Any]) -> str | None:
    """Returns in words the kind of a tokenizer that cannot be exported; None for BPE that may be byte-level."""
    if model.get("type", "BPE") != "BPE":
        return str(quoted(model["type"])).strip("'")
    if model.get("byte_fallback"):
        return "SentencePiece's BPE"
    is_whole = isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    return None if is_whole else "BPE without merges"


def _cut(tokenizer: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns the start and end of each word of `_TEXT`, and its token ids."""
    words = tokenizer.pre_tokenizer.pre_tokenize_str(_TEXT) if tokenizer.pre_tokenizer else []
    return [place for _, place in words], tokenizer.encode(_TEXT, add_special_tokens=False).ids


def _tokens(moe: MoeFile, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata for tokens, their types and merges."""
    size = moe.config.vocab_size
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    found = [(i, token, _NORMAL) for token, i in content["model"]["vocab"].items()]
    for added in content.get("added_tokens") or []:
        kind = _CONTROL if added["special"] else _USER_DEFINED
        found.append((added["id"], added["content"], kind))
    for i, token, kind in found:
        if not 0 <= i < size:
            raise FormatError(
                f"{moe.path}: token {quoted(token)} has number {i} of {size}; GGUF has no place for it"
            )
        tokens[i], kinds[i] = token, kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def _special(moe: MoeFile, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the metadata for special tokens and the chat template."""
    out: dict[str, Any] = {}
    for key, index in zip(("eos", "eot", "eom"), moe.config.eos_ids, strict=False):
        out[f"tokenizer.ggml.{key}_token_id"] = index
    settings = parse_object(moe.sections.get(_CONFIG, b"{}"), _CONFIG)
    first = tokenizer.encode("")
    out["tokenizer.ggml.add_bos_token"] = bool(first)
    if first:
        out["tokenizer.ggml.bos_token_id"] = int(first[0])
    template = settings.get("chat_template")
    if _TEMPLATE in moe.sections:
        template = moe.sections[_TEMPLATE].decode()
    if isinstance(template, str):
        out["tokenizer.chat_template"] = template
    return out
