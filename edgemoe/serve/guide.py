"""The constraint on one reply: which tokens may come next, so that it follows a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.serve.grammar import Grammars, lost

__all__ = ["Guide"]


class Guide:
    """A `Constraint` that makes one reply follow a grammar, after its reasoning or from where a call begins.

    One thread at a time.
    """

    def __init__(
        self,
        grammars: Grammars | None,
        grammar: str | None,
        *,
        is_reasoning: bool = False,
        reasoning: tuple[int | None, int | None] = (None, None),
        most_reasoning: int = -1,
        lazy: Mapping[int, str] | None = None,
        several: bool = True,
    ) -> None:
        """Starts a reply.

        Args:
            grammars: makes the matchers.
            grammar: the grammar of the answer; None for free text, apart from `lazy`.
            is_reasoning: the prompt has opened the reasoning already.
            reasoning: the tokens that open and close the reasoning; None for one that is not a single token.
            most_reasoning: the tokens of reasoning after which it is closed; -1 for no limit.
            lazy: grammars that begin after a certain token, by that token.
            several: whether the reply goes on after the end of a lazy grammar.
        """
        self._grammars, self._grammar, self._lazy, self._several = (
            grammars,
            grammar,
            lazy or {},
            several,
        )
        self._open, self._close = reasoning
        self._is_reasoning, self._most, self._thought = is_reasoning, most_reasoning, 0
        self._is_first = True
        self._matcher: Any = None
        if grammar is not None and grammars is not None and not is_reasoning:
            self._matcher = grammars.matcher(grammar)

    def allowed(self) -> NDArray[np.int32] | None:
        """See `Constraint.allowed`."""
        if self._grammars is None:
            return None
        if self._is_reasoning:
            if self._close is None or not 0 <= self._most <= self._thought:
                return None
            return self._grammars.only(self._close)
        if self._matcher is None:
            return None
        mask = self._grammars.mask(self._matcher)
        if self._is_first and self._open is not None and self._most != 0:
            mask[self._open // 32] |= np.uint32(1 << (self._open % 32)).view(np.int32)
        return mask

    def take(self, token: int) -> bool:
        """See `Constraint.take`."""
        was_first, self._is_first = self._is_first, False
        if self._is_reasoning:
            self._thought += 1
            if token == self._close:
                self._is_reasoning = False
                if self._grammar is not None and self._grammars is not None:
                    self._matcher = self._grammars.matcher(self._grammar)
            return False
        if token == self._open and was_first:
            self._is_reasoning, self._matcher = True, None
            return False
        if self._matcher is None:
            if token in self._lazy and self._grammars is not None:
                self._matcher = self._grammars.matcher(self._lazy[token])
            return False
        if not self._matcher.consume_token(token):
            if self._grammar is None:  # an unconstrained call is better than none
                self._matcher = None
                return False
            raise lost(self._matcher)
        if not self._matcher.is_stopped() and not (self._lazy and self._matcher.is_accepting()):
            return False
        if self._grammar is None:  # a call is complete; text may follow
            self._matcher = None
            return not self._several
        return True
