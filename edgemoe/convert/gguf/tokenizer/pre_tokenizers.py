"""Pre-tokenizers, which split a text into words before byte-level BPE, by llama.cpp's names.

The regular expressions are those of the models' own tokenizer.json. llama.cpp has variants that suit its regex engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """The behaviour that a name stands for."""

    cuts: tuple[str, ...]
    """Regular expressions, applied one after the other; each isolates its matches in the pieces so far."""
    ignore_merges: bool = False
    """A word that is a token becomes that token, whatever its merges would give."""
    adds_bos: bool = False
    """Whether BOS comes before a text, if the file does not say."""
    composes: bool = False
    """The text is first normalised to Unicode NFC, which llama.cpp does not do."""


_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ASIAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Escapes, because editors may normalise some of these letters to other code points.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-"
    "\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-"
    "\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-"
    "\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0"
    "-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _words(letters: str, numbers: str, *, endings: str = _ENDINGS, also: str = "") -> str:
    """Returns the expression for words, optionally after one sign, and for numbers, signs and spaces."""
    return rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{numbers}| ?[^\s{letters}\p{{N}}]+[\r\n{also}]*|{_SPACES}"


def _cases(numbers: str, *, endings: str = "", but: str = "") -> str:
    """Returns the expression that also splits words where lower case is followed by upper case."""
    upper, lower = (f"[{letters}{but}]" for letters in (_UPPER, _LOWER))
    sign = r"[^\r\n\p{L}\p{N}]?"
    return rf"{sign}{upper}*{lower}+{endings}|{sign}{upper}+{lower}*{endings}|{numbers}"


_TAIL = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_LLAMA3 = _words(r"\p{L}", _THREE)
_QWEN2 = _words(r"\p{L}", _ONE)
_GPT4O = _cases(_THREE, endings=f"{_ENDINGS}?") + _TAIL
_KIMI = (
    r"\p{Han}+|"
    + _cases(_THREE, endings=f"{_ENDINGS}?", but=r"&&[^\p{Han}]")
    + rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_DIGITS_FIRST = PreTokenizer((_ONE, _GPT2))
_WHOLE_WORDS = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "bailingmoe": PreTokenizer((_BAILING,)),
    "bailingmoe2": PreTokenizer((_BAILING,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "command-r": _DIGITS_FIRST,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _ONE)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            _DEEPSEEK_SIGNS,
            r"\s+$",
            _HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-v3": PreTokenizer((_THREE, _ASIAN, _DEEPSEEK_V3)),
    "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "glm5": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "lfm2": _WHOLE_WORDS,
    "llama-bpe": _WHOLE_WORDS,
    "llama3": _WHOLE_WORDS,
    "llama4": PreTokenizer((_GPT4O,)),
    "minimax-m2": PreTokenizer((_GPT4O,)),
    "olmo": PreTokenizer((_GPT2,)),
    "pixtral": _WHOLE_WORDS,
    "qwen2": PreTokenizer((_QWEN2,), composes=True),
    "qwen35": PreTokenizer((_words(r"\p{L}\p{M}", _ONE),)),
    "refact": _DIGITS_FIRST,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "tekken": PreTokenizer((_cases(_ONE) + _TAIL,), ignore_merges=True, adds_bos=True),
}
"""Pre-tokenizers by `tokenizer.ggml.pre`."""
