"""`--json-schema`: replies that follow a JSON schema."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgemoe.cli.console import decode_text

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from edgemoe.runtime.chat import Chat
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.requests import Constraint

__all__ = ["keep_to", "opened_beside", "schema_of"]

_LARGEST = 1 << 20  # bytes of a file


def schema_of(given: str) -> object:
    """Returns the JSON schema that `--json-schema` gives, as text or in a file.

    Raises:
        ValueError: it is no JSON object, or the packages that enforce schemas are not installed.
        OSError: the file cannot be read.
    """
    text = given
    if not given.lstrip().startswith("{"):
        with open(given, "rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"--json-schema: {given} has more than {_LARGEST} bytes")
        text = decode_text(content, given)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--json-schema: expected JSON, or a file of it; {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("--json-schema: expected an object")
    for name in ("llguidance", "msgspec"):
        if importlib.util.find_spec(name) is None:
            raise ValueError('--json-schema: expected the extra: pip install "edgemoe[serve]"')
    return schema


def opened_beside(options: dict[str, Any], model: str, schema: object) -> Engine:
    """Opens a model with room left, within the budget of its `options`, for a schema's masks over its vocabulary."""
    from edgemoe.errors import OutOfBudget
    from edgemoe.file.reader import open_moe
    from edgemoe.runtime.budget import default_ram
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.options import EngineOptions
    from edgemoe.serve.grammar import grammar_bytes, schema_bytes

    masks = grammar_bytes(open_moe(model).config.vocab_size) + schema_bytes(schema)
    ram = default_ram() if options["ram"] is None else options["ram"]
    try:
        return Engine(model, EngineOptions(**options | {"ram": max(ram - masks, 1)}))
    except OutOfBudget as error:
        raise error.beside(masks, "--json-schema", ram=ram) from None


def keep_to(engine: Engine, chat: Chat, schema: object) -> None:
    """Makes a chat's replies follow a schema; it applies to what comes after the reasoning.

    Raises:
        ValueError: the model has no tokenizer, or the schema cannot be enforced.
    """
    from edgemoe.serve.grammar import Grammars
    from edgemoe.serve.guide import Guide
    from edgemoe.serve.problems import Problem
    from edgemoe.serve.reply_grammar import channels
    from edgemoe.text.replies import reply_format

    @contextlib.contextmanager
    def as_flag() -> Iterator[None]:
        try:
            yield
        except Problem as problem:
            raise ValueError(f"--json-schema: {problem.message}") from None

    class FlagGuide(Guide):
        """Its errors name the flag, and not a field of a request."""

        def allowed(self) -> NDArray[np.int32] | None:
            with as_flag():
                return super().allowed()

        def take(self, token: int) -> bool:
            with as_flag():
                return super().take(token)

    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("--json-schema: the model has no tokenizer")
    grammars = Grammars(
        tokenizer, engine.config.vocab_size, sorted({*engine.config.eos_ids, *tokenizer.eos_ids}),
        spare=engine.model.room.spare, made=engine.model.room.take_in,
    )  # fmt: skip
    try:
        grammar = grammars.json_schema("--json-schema", schema)
    except Problem as problem:
        raise ValueError(problem.message) from None
    form, _ = reply_format(tokenizer.chat_template)
    if form.is_channelled:
        grammar = channels(grammars, [], grammar, must=False)
    compiled = grammars.compiled(grammar)  # once, for all replies
    words = form.reasoning if form.reasoning and not form.is_channelled else ("", "")
    first, last = (tokenizer.token_id(word) if word else None for word in words)

    def constraint(ids: list[int]) -> Constraint:
        end = ids[-4:]  # the words with which a template opens the reply
        is_reasoning = first in end and last not in end and last is not None
        return FlagGuide(
            grammars, compiled.grammar, is_reasoning=is_reasoning, reasoning=(first, last)
        )

    chat.constraint = constraint
