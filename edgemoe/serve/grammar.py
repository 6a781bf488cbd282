"""Grammars that constrain texts: JSON schemas, regular expressions and others. llguidance makes the masks."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.serve.problems import Problem, wrong
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Grammars", "grammar_bytes", "lost"]

_LARGEST = 256 << 10  # characters of a schema or grammar
_KEPT = 64
_SPACE = r"[\x20\x0A]{0,12}"


def grammar_bytes(vocab_size: int) -> int:
    """Returns about how many bytes the masks of a vocabulary take; measured with 49,152 and with 151,936 tokens."""
    return (16 << 20) + 600 * vocab_size


class Grammars:
    """The grammars and matchers for replies of one model. Any thread may call it.

    A grammar is a string in llguidance's notation. Compiled ones are cached.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_ids)
        self._lock = threading.Lock()
        self._matcher = functools.lru_cache(maxsize=_KEPT)(self._compiled)

    def json_schema(self, param: str, schema: object) -> str:
        """Returns the grammar of a JSON schema.

        Args:
            param: the field that it comes from, for errors.
            schema: the schema.

        Raises:
            Problem: it cannot be enforced, with llguidance's reason.
        """
        text = _text(param, spaced(schema))
        from llguidance import LLMatcher

        try:
            return self.checked(param, LLMatcher.grammar_from_json_schema(text))
        except ValueError as error:
            raise wrong(param, str(error)) from None

    def regex(self, param: str, regex: str) -> str:
        """Returns the grammar of a regular expression; raises as `json_schema` does."""
        from llguidance import LLMatcher

        return self.checked(param, LLMatcher.grammar_from_regex(_text(param, regex)))

    def choice(self, param: str, texts: Sequence[str]) -> str:
        """Returns the grammar that allows exactly one of some texts; raises as `json_schema` does."""
        if not texts:
            raise wrong(param, "expected at least one text, got none")
        # One terminal, which becomes an automaton: thousands of separate rules would be too many for the parser.
        lines = " | ".join(json.dumps(t, ensure_ascii=False) for t in dict.fromkeys(texts))
        return self.lark(param, f"start: ONE\nONE: {lines}")

    def lark(self, param: str, text: str) -> str:
        """Returns a grammar in Lark's notation as it is, once it is checked; raises as `json_schema` does."""
        from llguidance import LLMatcher

        return self.checked(param, LLMatcher.grammar_from_lark(_text(param, text)))

    def gbnf(self, param: str, text: str) -> str:
        """Returns the grammar of a text in GBNF, llama.cpp's notation; raises as `json_schema` does."""
        from llguidance import gbnf_to_lark

        if len(text) > _LARGEST:
            raise wrong(param, f"expected at most {_LARGEST} characters, got {len(text)}")
        try:
            lark = (
                text if "start:" in text and "::=" not in text else gbnf_to_lark.any_to_lark(text)
            )
        except Exception as error:  # the converter has error types of its own
            raise wrong(param, f"not GBNF: {' '.join(str(error).split())}") from None
        return self.lark(param, lark)

    def special(self, text: str) -> int | None:
        """Returns the number of a token that is special to llguidance, so that no text matches it; else None."""
        token = self.tokenizer.token_id(text)
        return token if token is not None and self._backend.is_special_token(token) else None

    def matcher(self, grammar: str) -> Any:
        """Returns a new matcher at the start of a checked grammar."""
        return self._matcher(grammar).deep_copy()

    def mask(self, matcher: Any) -> NDArray[np.int32]:
        """Returns the mask of the tokens that may come next: int32 [ceil(V / 32)], a bit for each token.

        Raises:
            Problem: the matcher failed, and the reply cannot go on.
        """
        mask = self._blank()
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():  # then the mask allows only the end, as if the reply were complete
            raise lost(matcher)
        return mask

    def only(self, token: int) -> NDArray[np.int32]:
        """Returns the mask that allows one token alone, as `mask` returns it."""
        mask = self._blank()
        mask.view(np.uint32)[token // 32] = 1 << (token % 32)
        return mask

    def _blank(self) -> NDArray[np.int32]:
        return np.zeros(-(-self._vocab_size // 32), np.int32)

    def checked(self, param: str, grammar: str) -> str:
        """Returns a grammar in llguidance's own JSON or Lark as it is; raises as `json_schema` does."""
        matcher = self._matcher(grammar)
        if matcher.is_error():
            raise wrong(param, f"cannot be kept to: {_why(matcher)}")
        return grammar

    def _compiled(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._backend, grammar, log_level=0)
        first = matcher.deep_copy()
        with contextlib.suppress(Problem):  # the first mask finds grammars that match nothing
            self.mask(first)
        return first if first.is_error() else matcher

    @property
    def _backend(self) -> Any:
        with self._lock:
            return self._made

    @functools.cached_property
    def _made(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self.tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)


def lost(matcher: Any) -> Problem:
    """Returns the error of a reply whose matcher failed. It is a 400, as the same request would fail again."""
    return Problem(400, f"grammar: cannot be kept to: {_why(matcher)}")


def _why(matcher: Any) -> str:
    """Returns why a matcher failed in llguidance's words, without the internal state that it adds."""
    text = " ".join(matcher.get_error().partition("<state>")[0].split())[:500]
    return "no text is of this form" if text == "NoExtensionBias" else text


def spaced(schema: object) -> object:
    """Returns a schema that limits the whitespace between values, as a weak model may write it endlessly."""
    if isinstance(schema, dict) and "x-guidance" not in schema:
        return {**schema, "x-guidance": {"whitespace_pattern": _SPACE}}
    return schema


def _text(param: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _LARGEST:
        raise wrong(param, f"expected at most {_LARGEST} characters, got {len(text)}")
    return text
