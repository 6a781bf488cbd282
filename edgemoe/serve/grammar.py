"""Grammars that constrain texts: JSON schemas, regular expressions and others. llguidance makes the masks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from edgemoe.serve.problems import Problem, wrong
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Compiled", "Grammars", "grammar_bytes", "lost", "schema_bytes"]

_LARGEST = 256 << 10  # characters of a schema or grammar
# Bytes of masks for each token of the vocabulary; of a compiled grammar in any case, and for each of its characters.
# Measured, with schemas.
_PER_TOKEN, _PER_GRAMMAR, _PER_CHARACTER = 600, 1 << 19, 112
_KEPT = 8 << 20  # bytes of compiled grammars that no reply uses
_PER_STATE = 1 << 10  # bytes of a state of a lexer, which makes them as a reply goes on; measured
_FEWEST_STATES, _MOST_STATES = 4096, 250_000  # whatever the memory; llguidance's own limit
_SPACE = r"[\x20\x0A]{0,12}"


def grammar_bytes(vocab_size: int) -> int:
    """Returns about how many bytes the masks of a vocabulary take; measured with 49,152 and with 151,936 tokens."""
    return (16 << 20) + _PER_TOKEN * vocab_size


def _compiled_bytes(grammar: str) -> int:
    """Returns about how many bytes a compiled grammar takes."""
    return _PER_GRAMMAR + _PER_CHARACTER * len(grammar)


def schema_bytes(schema: object) -> int:
    """Returns about how many bytes the compiled grammar of a schema takes beyond what `grammar_bytes` has for it."""
    return max(_compiled_bytes(json.dumps(schema)) - _KEPT, 0)


class Compiled:
    """A compiled grammar."""

    __slots__ = ("__weakref__", "grammar", "matcher")

    def __init__(self, grammar: str, matcher: Any) -> None:
        self.grammar, self.matcher = grammar, matcher

    def __sizeof__(self) -> int:
        return _compiled_bytes(self.grammar)


class Grammars:
    """The grammars and matchers for replies of one model. Any thread may call it.

    A grammar is a string in llguidance's notation. Compiled ones are cached.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        spare: int = _PER_STATE * _MOST_STATES,
        need: Callable[[int], None] = lambda _: None,
        made: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Makes nothing yet: the masks are made for the first grammar.

        Args:
            tokenizer: the model's.
            vocab_size: tokens of the model.
            eos_ids: the tokens that end a reply.
            spare: bytes that the lexer of one reply may take as it goes on. The least is 4 MiB, which `grammar_bytes`
                has. A reply that takes more fails.
            need: makes room for so many bytes, which a new grammar takes; or raises a Problem.
            made: is called once the masks are made, with the bytes of `grammar_bytes` that they keep.
        """
        self.tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_ids)
        self._need, self._on_made = need, made
        self._states = min(max(spare // _PER_STATE, _FEWEST_STATES), _MOST_STATES)
        self._lock = threading.Lock()
        self._compiled: WeakValueDictionary[str, Compiled] = WeakValueDictionary()
        self._last: list[Compiled] = []  # those used last, as far as their memory is reserved

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
        return self.compiled(grammar).matcher.deep_copy()

    def compiled(self, grammar: str) -> Compiled:
        """Returns a grammar as it was compiled last, or compiles it; a request keeps it as long as it is answered."""
        with self._lock:
            found = self._compiled.get(grammar)
        if found is None:
            found = Compiled(grammar, self._first_matcher(grammar))
        with self._lock:
            self._compiled[grammar] = found
            last = [found, *(one for one in self._last if one is not found)]
            sizes = itertools.accumulate(map(sys.getsizeof, last))
            self._last = [one for one, size in zip(last, sizes, strict=True) if size <= _KEPT]
        return found

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
        with self._lock:
            is_new = grammar not in self._compiled
        if is_new:
            self._need(_compiled_bytes(grammar))
        matcher = self.compiled(grammar).matcher
        if matcher.is_error():
            raise wrong(param, f"cannot be kept to: {_why(matcher)}")
        return grammar

    def _first_matcher(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=self._states)
        matcher = LLMatcher(self._backend, grammar, log_level=0, limits=limits)
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

        made = LLTokenizer(self.tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)
        self._on_made(_PER_TOKEN * self._vocab_size)
        return made


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
