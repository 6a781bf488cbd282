"""Grammars of what a reply has to be: JSON, a schema, a call of a tool. Masks are llguidance's."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.serve.problems import wrong
from edgemoe.text.calls import markers
from edgemoe.text.replies import ReplyFormat
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Grammars", "grammar_bytes"]

_LARGEST = 256 << 10  # characters of a schema or grammar
_KEPT = 64
_MOST_CALLS = 16  # of a reply that must call: a weak model does not find an end
_NAMED, _VALUES = ("properties", "$defs", "definitions"), ("enum", "const", "default", "examples")
_JOINED = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "unevaluatedProperties")
"""Words beside which a schema's own properties are not all."""
_SPACE = r"[\x20\x0A]{0,12}"


def grammar_bytes(vocab_size: int) -> int:
    """Returns about the memory that masks of a vocabulary take, measured at 49,152 tokens and 151,936."""
    return (16 << 20) + 600 * vocab_size


class Grammars:
    """Makes guides for replies of one model. Any thread; what is slow happens once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_ids)
        self._lock = threading.Lock()
        self._matcher = functools.lru_cache(maxsize=_KEPT)(self._compiled)

    def json_schema(self, param: str, schema: object) -> str:
        """Returns the grammar of a JSON schema.

        Raises:
            Problem: it cannot be kept to; llguidance's words.
        """
        text = _text(param, _spaced(schema))
        from llguidance import LLMatcher

        try:
            return self._checked(param, LLMatcher.grammar_from_json_schema(text))
        except ValueError as error:
            raise wrong(param, str(error)) from None

    def regex(self, param: str, regex: str) -> str:
        """Returns the grammar of a regular expression; raises as `json_schema` does."""
        from llguidance import LLMatcher

        return self._checked(param, LLMatcher.grammar_from_regex(_text(param, regex)))

    def choice(self, param: str, texts: Sequence[str]) -> str:
        """Returns the grammar of one of some texts."""
        lines = " | ".join(json.dumps(t, ensure_ascii=False) for t in texts)
        return self.lark(param, f"start: {lines}")

    def lark(self, param: str, text: str) -> str:
        """Returns a Lark grammar; raises as `json_schema` does."""
        from llguidance import LLMatcher

        return self._checked(param, LLMatcher.grammar_from_lark(_text(param, text)))

    def gbnf(self, param: str, text: str) -> str:
        """Returns the grammar of llama.cpp's notation; raises as `json_schema` does."""
        from llguidance import gbnf_to_lark

        if len(text) > _LARGEST:
            raise wrong(param, f"expected at most {_LARGEST} characters, got {len(text)}")
        try:
            lark = (
                text if "start:" in text and "::=" not in text else gbnf_to_lark.any_to_lark(text)
            )
        except Exception as error:  # a converter's own
            raise wrong(param, f"not GBNF: {' '.join(str(error).split())}") from None
        return self.lark(param, lark)

    def calls(
        self,
        form: ReplyFormat,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        after: str = "",
    ) -> str:
        """Returns the grammar of calls of tools, as a model writes them.

        Args:
            after: what has been written of the first one already.
        """
        rules, names = [], []
        for i, tool in enumerate(tools):
            schema = _closed(tool.get("parameters") or {"type": "object"})
            self.json_schema(f"tools[{i}].function.parameters", schema)
            before = form.before.replace("{name}", str(tool["name"])).removeprefix(after)
            rules.append(
                f"call{i}: {self._literal(before)} args{i} {self._literal(form.after)}\n"
                f"args{i}: %json {json.dumps(_spaced(schema))}"
            )
            names.append(f"call{i}")
        one = " | ".join(names)
        many = several and not after and bool(form.closer)
        start = (
            f'start: calls ("\\n" calls){{0,{_MOST_CALLS - 1}}}\ncalls: {one}'
            if many
            else f"start: {one}"
        )
        return self.lark("tools", "\n".join([start, *rules]))

    def _literal(self, text: str) -> str:
        """Returns text as Lark has it, with tokens that are no text by their numbers."""
        parts: list[str] = []
        while text:
            found = [(text.find(m), m) for m in markers(text) if self._special(m) is not None]
            at, mark = min(found, default=(len(text), ""))
            if at:
                parts.append(json.dumps(text[:at], ensure_ascii=False))
            if mark:
                parts.append(f"<[{self._special(mark)}]>")
            text = text[at + len(mark) :]
        return " ".join(parts) or '""'

    def _special(self, text: str) -> int | None:
        """Returns the token that llguidance takes for no text, though it may be shown as some."""
        token = self._tokenizer.token_id(text)
        return token if token is not None and self._backend.is_special_token(token) else None

    def matcher(self, grammar: str) -> Any:
        """Returns a new matcher at the start of a checked grammar."""
        return self._matcher(grammar).deep_copy()

    def mask(self, matcher: Any) -> NDArray[np.int32]:
        """Returns which tokens a matcher lets come next."""
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def _checked(self, param: str, grammar: str) -> str:
        matcher = self._matcher(grammar)
        if matcher.is_error():
            raise wrong(param, f"cannot be kept to: {' '.join(matcher.get_error().split())[:500]}")
        return grammar

    def _compiled(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self._backend, grammar, log_level=0)

    @property
    def _backend(self) -> Any:
        with self._lock:
            return self._made

    @functools.cached_property
    def _made(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)


def _spaced(schema: object) -> object:
    """Returns a schema that allows no endless space between values, in which a weak model loses itself."""
    if isinstance(schema, dict) and "x-guidance" not in schema:
        return {**schema, "x-guidance": {"whitespace_pattern": _SPACE}}
    return schema


def _closed(schema: Any) -> Any:
    """Returns a schema whose objects have the properties that it names alone, where it does not say otherwise.

    What a tool does not know is of no use to it, and a weak model does not find an end.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):  # its keys are names, not words of a schema
            out[key] = {name: _closed(inner) for name, inner in value.items()}
        else:
            out[key] = value if key in _VALUES else _closed(value)
    is_open = not ({"additionalProperties", "patternProperties", *_JOINED} & schema.keys())
    if isinstance(schema.get("properties"), dict) and "type" in schema and is_open:
        out["additionalProperties"] = False
    return out


def _text(param: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _LARGEST:
        raise wrong(param, f"expected at most {_LARGEST} characters, got {len(text)}")
    return text
