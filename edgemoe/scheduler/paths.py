"""A trained predictor of routing paths: from the tokens so far to the experts of all layers.

After ExpertFlow's routing-path predictor (arXiv 2410.17954), with a recurrent state in place of its encoder and
decoder, because here it must answer in a fraction of a layer's time. `edgemoe profile train` makes one and keeps it in
the model's file as the section "paths", a safetensors file. V rows of embedding, width d, L layers of E experts:

    embedding  float16 [V, d]      of a token, or, where V is smaller than the vocabulary, of all with the same hash
    w_input    float32 [3d, d]     of a gated recurrent unit (GRU): reset, update, candidate
    w_state    float32 [3d, d]
    b_input    float32 [3d]
    b_state    float32 [3d]
    now        float32 [L*E, 2d]   from state and embedding of the last token to the logits of its own path
    now_bias   float32 [L*E]
    next       float32 [L*E, d]    from the state alone to those of the token after it, not yet known
    next_bias  float32 [L*E]

A token reads all of it but the embedding: its matrices are kept in 4 bits with a scale per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.tensors import is_finite, view
from edgemoe.scheduler.base import Setting
from edgemoe.scheduler.predict import Logistic, NextUse, Turns

__all__ = ["SECTION", "PathPredictor", "PathUse", "hashed"]

Array = NDArray[np.float32]

SECTION = "paths"
_MOST = 64  # tokens of a prompt's chunk that are looked at: it is trained on pieces not much longer


def hashed(ids: NDArray[np.integer[Any]], rows: int) -> NDArray[np.int64]:
    """Returns the row of the embedding for tokens: multiplicative hashing, `rows` a power of two."""
    mixed = (ids.astype(np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(33 - int(rows).bit_length())).astype(np.int64)


class PathPredictor:
    """Follows a text token by token and tells the path of the last token and of the one after it."""

    def __init__(
        self, tensors: Mapping[str, NDArray[Any]], num_layers: int, num_experts: int
    ) -> None:
        """Args:
        tensors: as in a section; their shapes fit each other. None of them is kept.
        """
        self._embedding = tensors["embedding"].copy()
        self._rows, d = self._embedding.shape
        self._of_input, self._of_state = (
            _core.RoundedRows(tensors[f"w_{name}"], tensors[f"b_{name}"])
            for name in ("input", "state")
        )
        self._heads = [
            _core.RoundedRows(tensors[name], tensors[f"{name}_bias"]) for name in ("now", "next")
        ]
        self._seen = np.zeros(2 * d, np.float32)  # the state, then the embedding
        self._state = self._seen[:d]
        self._from_input, self._from_state = np.empty((2, 3 * d), np.float32)
        shape = (num_layers, num_experts)
        self._paths: list[Array] = [np.zeros(shape, np.float32) for _ in self._heads]
        self._is_known = [False, False]

    @classmethod
    def from_section(cls, content: bytes, num_layers: int, num_experts: int) -> PathPredictor:
        """Reads one, which keeps nothing of `content`.

        Raises:
            FormatError: damaged, or of another model.
        """
        try:
            t, _ = view(content)
            V, d = t["embedding"].shape
        except (KeyError, ValueError):
            raise FormatError(f"section {SECTION}: not a path predictor of edgemoe") from None
        n = num_layers * num_experts
        shapes = {
            "embedding": (V, d), "w_input": (3 * d, d), "w_state": (3 * d, d), "b_input": (3 * d,),
            "b_state": (3 * d,), "now": (n, 2 * d), "now_bias": (n,), "next": (n, d), "next_bias": (n,),
        }  # fmt: skip
        for name, shape in shapes.items():
            kind = np.float16 if name == "embedding" else np.float32
            if name not in t or t[name].shape != shape or t[name].dtype != kind:
                raise FormatError(
                    f"section {SECTION}: expected {name} to be {list(shape)}; train it again for this model"
                )
            if not is_finite(t[name]):
                raise FormatError(f"section {SECTION}: {name} has values that are no numbers")
        if V & (V - 1) or V < 2 or d < 1:
            raise FormatError(
                f"section {SECTION}: expected a power of two of rows and some width, got {V} and {d}"
            )
        return cls(t, num_layers, num_experts)

    def begin(self) -> None:
        """A new text starts."""
        self._seen.fill(0.0)
        self._is_known = [False, False]

    def follow(self, ids: NDArray[np.integer[Any]]) -> None:
        """Takes the next tokens [T] of the text, of many only the last."""
        d = len(self._state)
        rows = hashed(ids[-_MOST:], self._rows)
        inputs = self._embedding[rows].astype(np.float32)
        state, x, h = self._state, self._from_input, self._from_state
        for token in inputs:
            self._of_input.dot(token, x)
            self._of_state.dot(state, h)
            gates = 1.0 / (1.0 + np.exp(-x[: 2 * d] - h[: 2 * d]))
            update = gates[d:]
            new = np.tanh(x[2 * d :] + gates[:d] * h[2 * d :])
            state += (1.0 - update) * (new - state)
        self._seen[d:] = inputs[-1]
        self._is_known = [False, False]

    @property
    def now(self) -> Array:
        """[L, E]: logits of the last token's path; its own array. Computed when first asked for: it takes longest."""
        return self._path(0, self._seen)

    @property
    def next(self) -> Array:
        """[L, E]: of the token after it; likewise."""
        return self._path(1, self._state)

    def _path(self, i: int, seen: Array) -> Array:
        if not self._is_known[i]:
            self._heads[i].dot(seen, self._paths[i].reshape(-1))
            self._is_known[i] = True
        return self._paths[i]


class PathUse(NextUse):
    """`NextUse`, which knows the text too: what it says and the trained predictor's logits are weighed on the way.

    Two logistic regressions of both: one for the token after, when a layer has run; one for the token that runs next,
    as soon as it is known, for all layers at once.
    """

    def __init__(self, setting: Setting) -> None:
        """Args:
        setting: whose model has the section.

        Raises:
            ValueError: it has none.
            FormatError: it is damaged, or of another model.
        """
        L, E = setting.num_layers, setting.num_experts
        if SECTION not in setting.sections:
            raise ValueError(
                "the model's file has no path predictor; edgemoe profile train makes it"
            )
        super().__init__(L, E, setting.experts_per_token)
        self._path = PathPredictor.from_section(setting.sections[SECTION], L, E)
        # Odds against use by habit, for the token after the one that a layer ran last; and what was said of the layers
        # that are learned from a token before.
        self._habit = np.zeros((L, E))
        self._turns = Turns(L, E)
        self._asked = self._asked_now = np.zeros((3, 0))
        self._path_odds = np.empty((L, E))
        self._weigh_after = Logistic([0.0, -0.5, 0.5])
        self._weigh_at = Logistic([0.0, -0.3, 0.7])
        self._features.mix(
            habit=self._habit, text=self._path.next, weights=self._weigh_after.against
        )
        self._has_run = self._can_learn = self._was_asked = False

    def begin(self) -> None:
        """See `Scheduler.begin`."""
        self._path.begin()
        self._has_run = False

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:
        """See `Scheduler.tokens`. It follows one text: of several at once it says nothing."""
        if sequences > 1:
            self.begin()
            self._can_learn = self._was_asked = False
            return
        if self._weigh_after.is_next_due:
            self._asked = self._lesson_of(self._path.next)
        self._path.follow(ids)
        _ = self._path.next  # which `update` reads
        self._can_learn, self._was_asked = self._has_run and len(ids) == 1, False
        self._has_run = True

    def path(self) -> NDArray[np.float64] | None:
        """Returns the odds against each expert's use by the token that runs next, [L, E], in logarithms.

        None where there is no saying: for a prompt, and for the first token of a sequence.
        """
        if not self._can_learn:
            return None
        self._was_asked = True
        now, odds = self._path.now, self._path_odds
        if self._weigh_after.is_next_due:
            self._asked_now = self._lesson_of(now)
        _core.mix_odds(self._habit, now, self._weigh_at.against, odds)
        return odds

    def _lesson_of(self, text: Array) -> NDArray[np.float64]:
        """Returns those of the layers whose turn it is: one, what habit says, what the text says; [3, n]."""
        layers = slice(self._turns.now.start, self._turns.now.stop)
        habit = self._habit[layers].reshape(-1)
        return np.stack([np.ones_like(habit), habit, text[layers].reshape(-1)])

    def learn(self) -> None:
        """See `NextUse.learn`."""
        super().learn()
        if self._can_learn and self._weigh_after.is_due:
            used = self._now[self._turns.take(), 1].reshape(-1)
            self._weigh_after.learn(self._asked, used)
            if self._was_asked:
                self._weigh_at.learn(self._asked_now, used)
