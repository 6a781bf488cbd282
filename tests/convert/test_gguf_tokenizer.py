"""A tokenizer built from a GGUF file encodes and decodes as the model's own does."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tiny_llama import TEXT, tiny_tokenizer
from tokenizers import Tokenizer, normalizers

from edgemoe.convert.gguf.tokenizer import end_tokens, tokenizer_files
from edgemoe.convert.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from edgemoe.errors import FormatError

# Written by hand, what differs between pre-tokenizers: whether digits stay together, suffixes in either case, changes
# from lower to upper case, what line ends take with them, and spaces. A space belongs to the word after it.
WORDS = {
    "qwen2": ["I", "'VE", " fooBar", "\n\n", "  ", " ", "1", "2", "3", "4", "5"],
    "llama-bpe": ["I", "'VE", " fooBar", "\n\n", "  ", " ", "123", "45"],
    "gpt-2": ["I", "'", "VE", " fooBar", "\n\n  ", " 12345"],
    "smollm": ["I", "'", "VE", " fooBar", "\n\n   ", "1", "2", "3", "4", "5"],
    "gpt-4o": ["I'VE", " foo", "Bar", "\n\n", "  ", " ", "123", "45"],
    "tekken": ["I", "'VE", " foo", "Bar", "\n\n", "  ", " ", "1", "2", "3", "4", "5"],
    "kimi-k2": ["I'VE", " foo", "Bar", "\n\n", "  ", " ", "123", "45"],
    "deepseek-v3": ["I", "'VE", " fooBar", "\n\n", "   ", "123", "45"],
    "deepseek-llm": ["I", "'", "VE", " fooBar", "\n", "\n", "   ", "12345"],
    "bailingmoe2": ["I", "'VE", " fooBar", "\n\n", "  ", " ", "1", "2", "3", "4", "5"],
    "laguna": ["I", "'VE", " fooBar", "\n\n", "  ", " ", "1", "2", "3", "4", "5"],
}
SAME = {
    "qwen35": "qwen2",
    "hunyuan": "qwen2",
    "llama3": "llama-bpe",
    "lfm2": "llama-bpe",
    "pixtral": "llama-bpe",
    "dbrx": "llama-bpe",
    "glm4": "llama-bpe",
    "glm5": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
    "llama4": "gpt-4o",
    "minimax-m2": "gpt-4o",
    "olmo": "gpt-2",
    "bailingmoe": "bailingmoe2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
}


def meta(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": v for key, v in {**found, **changes}.items() if v is not None}


def built(values: dict[str, Any]) -> Tokenizer:
    files = tokenizer_files(values, context_length=8, where="x.gguf")
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_are_cut_as_the_model_was_trained(name: str) -> None:
    text = "I'VE fooBar\n\n   12345"
    tokenizer = built(meta(name))
    assert tokenizer.pre_tokenizer is not None
    pieces = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == WORDS.get(SAME.get(name, name), pieces)
    assert name in WORDS or name in SAME or name == "deepseek-coder"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_text_comes_back(name: str) -> None:
    tokenizer = built(meta(name))
    for text in (
        TEXT,
        "  Ünïcode: 漢字かな, 한국어 naïve\u0301 \r\n\t🙂🙂 x1²³ ½Ⅷ٣  ",
        "a\u3000b \u200d",
    ):
        got = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        assert got == (
            normalizers.NFC().normalize_str(text) if PRE_TOKENIZERS[name].composes else text
        )


def test_the_first_token_is_the_kinds_or_the_files_own_choice() -> None:
    for pre, chosen, first in (
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ):
        ids = built(meta(pre, add_bos_token=chosen)).encode("The").ids
        assert (ids[0] == 0) is first, (pre, chosen)


def test_a_word_that_is_a_token_is_not_merged_where_the_kind_says_so() -> None:
    merges = meta()["tokenizer.ggml.merges"]
    kept = [merge for merge in merges if merge != "Ġag ain"]
    assert len(kept) < len(merges)
    for pre, whole in (("llama-bpe", True), ("dbrx", False)):
        tokenizer = built(meta(pre, merges=kept, add_bos_token=False))
        assert (tokenizer.encode(" again").tokens == ["Ġagain"]) is whole


def sentencepiece(**changes: Any) -> dict[str, Any]:
    octets = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "▁▁"]
    scores = {"ab": -1.0, "bc": -0.5, "abc": -3.0, "▁a": -2.0, "▁ab": -4.0, "▁▁": -5.0}
    tokens = ["<unk>", "<s>", "</s>", *octets, *words]
    found = {
        "model": "llama",
        "tokens": tokens,
        "scores": [scores.get(token, -10.0) for token in tokens],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": v for key, v in {**found, **changes}.items() if v is not None}


def test_sentencepiece_joins_the_best_pair_first() -> None:
    tokenizer = built(sentencepiece())
    # "bc" is joined before "ab", although "ab" is further left; "a" and "bc" then have no merge of their own.
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("cab", add_special_tokens=False).tokens == ["▁", "c", "ab"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("abc", "  a b", "é🙂\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_space_comes_before_a_text_and_after_a_special_token_unless_the_file_says_no() -> None:
    assert built(sentencepiece()).encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]
    plain = built(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert plain.encode("a</s>a a").tokens == ["a", "</s>", "a", "▁a"]
    assert plain.decode(plain.encode(" a").ids) == " a"


def test_gemma_joins_across_spaces_and_falls_back_to_bytes() -> None:
    octets = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *octets, "▁", "a", "b", "\n", "▁a", "b▁a", "\n\n"]
    values = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": [3, 3, 3, 2, *[6] * 256, *[1] * 7],
        "merges": ["▁ a", "b ▁a", "\n \n"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
    }
    tokenizer = built({f"tokenizer.ggml.{key}": v for key, v in values.items()})
    assert tokenizer.encode("b a\n\né").tokens == ["<bos>", "b▁a", "\n\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("b a\n\né").ids) == "b a\n\né"


def test_all_ends_of_a_reply_are_found() -> None:
    """As in llama.cpp: the tokens that the file names, and those known by their text."""
    tokens = ["a", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|end|>", "<|return|>"]
    values = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }
    assert end_tokens(values)["eos_token_id"] == [2, 3, 1, 4, 5]
    values["tokenizer.ggml.tokens"] = [*tokens, "<|call|>"]
    assert end_tokens(values)["eos_token_id"] == [2, 3, 1, 5, 6]
    assert end_tokens({"tokenizer.ggml.eos_token_id": 2})["eos_token_id"] == 2


def test_a_file_without_a_tokenizer_has_no_tokenizers_files() -> None:
    for kind in (None, "none", "no_vocab"):
        values = {} if kind is None else {"tokenizer.ggml.model": kind}
        assert tokenizer_files(values, context_length=8, where="x") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [1.0]}, "tokenizer.ggml.scores must hold 269 numbers"),
        ({"scores": ["-1"] * 269}, "tokenizer.ggml.scores must hold 269 numbers"),
        ({"scores": [math.nan] * 269}, "tokenizer.ggml.scores must hold 269 numbers"),
        ({"token_type": [[1]] * 269}, "tokenizer.ggml.token_type must hold 269 numbers"),
        ({"token_type": None}, "tokenizer.ggml.token_type must hold 269 numbers"),
        ({"unknown_token_id": "9" * 999}, "the unknown token '9{80,90}\\.{3}9{20,30}' is outside"),
        ({"unknown_token_id": 999}, "the unknown token 999 is outside the vocabulary"),
        (
            {"tokens": ["a" * 99, "a" * 20_000], "scores": [0.0, 0.0], "token_type": [1, 1]},
            "tokenizer.ggml.tokens are too long to find their merges",
        ),
        ({"model": ["llama"]}, "is not supported in GGUF; supported: gpt2, llama, gemma4"),
    ],
)
def test_tables_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        built(sentencepiece(**changes))
