"""Grammars that constrain replies: JSON schemas, regular expressions, tool calls. llguidance makes the masks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from edgemoe.serve.problems import Problem, wrong
from edgemoe.text.calls import markers
from edgemoe.text.replies import ReplyFormat
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Compiled", "Grammars", "grammar_bytes", "lost", "schema_bytes"]

logger = logging.getLogger(__name__)

_LARGEST = 256 << 10  # characters of a schema or grammar
_PER_TOKEN = 600  # bytes of the masks for each token of the vocabulary
_PER_CHARACTER = (
    112  # bytes of a compiled grammar for each of its characters; measured with schemas
)
_PER_GRAMMAR = 1 << 19  # and in any case
_KEPT = 8 << 20  # bytes of compiled grammars that no reply uses
_PER_STATE = 1 << 10  # bytes of a state of a lexer, which makes them as a reply goes on; measured
_STATES = (
    4096,
    250_000,
)  # the most states, whatever the memory, and with any memory (llguidance's)
_MOST_CALLS = 16  # in a reply that must call a tool: a weak model may never end by itself
_MOST_BEFORE = 8  # messages before the answer, for models that write in channels; likewise
_NAMED, _VALUES = ("properties", "$defs", "definitions"), ("enum", "const", "default", "examples")
_JOINED = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "unevaluatedProperties")
"""Keywords next to which a schema may have more properties than "properties" lists; see `_closed`."""
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
        spare: int = _PER_STATE * _STATES[1],
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
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_ids)
        self._need, self._told = need, made
        self._states = min(max(spare // _PER_STATE, _STATES[0]), _STATES[1])
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
        """Returns the grammar that allows exactly one of some texts; raises as `json_schema` does."""
        if not texts:
            raise wrong(param, "expected at least one text, got none")
        # One terminal, which becomes an automaton: thousands of separate rules would be too many for the parser.
        lines = " | ".join(json.dumps(t, ensure_ascii=False) for t in dict.fromkeys(texts))
        return self.lark(param, f"start: ONE\nONE: {lines}")

    def lark(self, param: str, text: str) -> str:
        """Returns a grammar in Lark's notation as it is, once it is checked; raises as `json_schema` does."""
        from llguidance import LLMatcher

        return self._checked(param, LLMatcher.grammar_from_lark(_text(param, text)))

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

    def reply(
        self, form: ReplyFormat, tools: Sequence[Mapping[str, Any]], answer: str | None, *,
        must: bool, several: bool, most_reasoning: int,
    ) -> tuple[str | None, dict[int, str]]:  # fmt: skip
        """Returns the grammars that constrain a reply.

        If a tool's schema cannot be enforced and no tool has to be called, the arguments of calls are not constrained.

        Args:
            form: how the model writes reasoning and calls.
            tools: those that may be called; empty for none.
            answer: the grammar of the answer; None for free text.
            must: one of the tools has to be called.
            several: more than one call is allowed.
            most_reasoning: the most tokens of reasoning, where a grammar limits it; -1 for no limit.

        Returns:
            A grammar of the whole reply, or None; and grammars that begin after a certain token, by that token.

        Raises:
            Problem: what the reply must be cannot be enforced.
        """
        try:
            if form.is_channelled:
                if not tools and answer is None and most_reasoning < 0:
                    return None, {}
                return self.channels(tools, answer, must=must, most_reasoning=most_reasoning), {}
            if must:
                return self.calls(form, tools, several=several), {}
            token = self._tokenizer.token_id(form.opener)
            if token is None:
                return self.free_calls(form, tools), {}
            return None, {token: self.calls(form, tools, several=False, after=form.opener)}
        except Problem as problem:
            if must or not tools:
                raise
            logger.debug("calls are not kept to their schemas: %s", problem)
            return answer, {}

    def calls(
        self,
        form: ReplyFormat,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        after: str = "",
    ) -> str:
        """Returns the grammar of tool calls, as a model writes them.

        Args:
            form: how the model writes.
            tools: those that may be called.
            several: more than one call is allowed.
            after: the beginning of the first call, if that is written already.
        """
        one = " | ".join(f"call{i}" for i in range(len(tools)))
        many = several and not after and bool(form.closer)
        start = (
            f'start: calls ("\\n" calls){{0,{_MOST_CALLS - 1}}}\ncalls: {one}'
            if many
            else f"start: {one}"
        )
        return self.lark("tools", "\n".join([start, *self._each(form, tools, after)]))

    def free_calls(self, form: ReplyFormat, tools: Sequence[Mapping[str, Any]]) -> str:
        """Returns the grammar of free text with tool calls, whose arguments must follow their schemas."""
        rules = ["start: (begun call)* TEXT", f"begun[lazy]: TEXT {json.dumps(form.opener)}"]
        rules += ["TEXT: /(.|\\n)*/", f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}"]
        return self.lark("tools", "\n".join([*rules, *self._each(form, tools, form.opener)]))

    def _each(
        self, form: ReplyFormat, tools: Sequence[Mapping[str, Any]], after: str
    ) -> Iterator[str]:
        """Yields the rules of each tool's call, callN; `after` is its beginning that is written already."""
        for i, tool in enumerate(tools):
            before = form.before.replace("{name}", str(tool["name"])).removeprefix(after)
            yield f"call{i}: {self._literal(before)} args{i} {self._literal(form.after)}"
            yield self._arguments(i, tool)

    def channels(
        self,
        tools: Sequence[Mapping[str, Any]],
        answer: str | None,
        *,
        must: bool,
        most_reasoning: int = -1,
    ) -> str:
        """Returns the grammar of a whole reply in channels, as gpt-oss writes it.

        Reasoning is free text, even before a call that has to come.

        Args:
            tools: those that may be called.
            answer: the grammar of the final channel; None for free text.
            must: a tool has to be called.
            most_reasoning: the most tokens of reasoning; -1 for no limit.
        """
        end, on = self._literal("<|end|><|start|>"), self._literal("<|channel|>")
        body, form = self._literal("<|message|>"), self._literal("<|constrain|>")
        form = f'(" json" | " "? {form} "json")?'
        rules = ["TEXT: /(.|\\n)*/"]
        kinds = [] if most_reasoning == 0 else ['"analysis"']
        kinds += ['"commentary"'] * bool(tools)
        before = (
            "" if not kinds else "before?" if most_reasoning > 0 else f"before{{0,{_MOST_BEFORE}}}"
        )
        if kinds:
            limit = f"[max_tokens={most_reasoning}]" if most_reasoning > 0 else ""
            rules += [
                f'before: {on} ({" | ".join(kinds)}) {body} thought {end} "assistant"',
                f"thought{limit}: TEXT",
            ]
        ends = [f"call{i}" for i in range(len(tools))]
        if not must:
            ends.append("final")
            text = "TEXT" if answer is None else "@answer"
            rules.append(f'final: {on} "final" {form} {body} {text}')
        for i, tool in enumerate(tools):
            name = json.dumps(f" to=functions.{tool['name']}")
            rules += [
                f'call{i}: (head{i} | {name} {on} "commentary") {form} {body} args{i} {self._literal("<|call|>")}',
                f'head{i}: {on} "commentary" {name}',
                self._arguments(i, tool),
            ]
        lark = "\n".join([f"start: {before} ({' | '.join(ends)})", *rules])
        if answer is None:
            return self.lark("tools", lark)
        inner = (
            json.loads(answer)["grammars"][0]
            if answer.startswith("{")
            else {"lark_grammar": answer}
        )
        whole = [{"name": "reply", "lark_grammar": lark}, {**inner, "name": "answer"}]
        return self._checked("response_format", json.dumps({"grammars": whole}))

    def _arguments(self, i: int, tool: Mapping[str, Any]) -> str:
        """Returns the rule of a tool's arguments; raises as `json_schema` does."""
        schema = _closed(tool.get("parameters") or {"type": "object"})
        self.json_schema(f"tools[{i}].function.parameters", schema)
        return f"args{i}: %json {json.dumps(_spaced(schema))}"

    def _literal(self, text: str) -> str:
        """Returns a text in Lark's notation, in which special tokens are written as token numbers."""
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
        """Returns the number of a token that is special to llguidance, so that no text matches it; else None."""
        token = self._tokenizer.token_id(text)
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
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():  # then the mask allows only the end, as if the reply were complete
            raise lost(matcher)
        return mask

    def _checked(self, param: str, grammar: str) -> str:
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

        made = LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)
        self._told(_PER_TOKEN * self._vocab_size)
        return made


def lost(matcher: Any) -> Problem:
    """Returns the error of a reply whose matcher failed. It is a 400, as the same request would fail again."""
    return Problem(400, f"grammar: cannot be kept to: {_why(matcher)}")


def _why(matcher: Any) -> str:
    """Returns why a matcher failed in llguidance's words, without the internal state that it adds."""
    text = " ".join(matcher.get_error().partition("<state>")[0].split())[:500]
    return "no text is of this form" if text == "NoExtensionBias" else text


def _spaced(schema: object) -> object:
    """Returns a schema that limits the whitespace between values, as a weak model may write it endlessly."""
    if isinstance(schema, dict) and "x-guidance" not in schema:
        return {**schema, "x-guidance": {"whitespace_pattern": _SPACE}}
    return schema


def _closed(schema: Any) -> Any:
    """Returns a schema whose objects have no other properties than it names, unless it says otherwise.

    A tool has no use for properties that it does not know, and a weak model may add them endlessly.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):  # its keys are names, not keywords
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
