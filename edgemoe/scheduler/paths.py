"""A trained predictor of routing paths: from the tokens so far to the experts of all layers.

A path is the set of experts that one token uses in every layer. The predictor follows ExpertFlow's (arXiv 2410.17954),
with a recurrent state in place of its encoder and decoder, because here it must answer in a fraction of a layer's time.
`edgemoe profile train` makes one and stores it in the model's file as the section "paths", a safetensors file. For V
rows of embedding, width d and L layers of E experts its tensors are:

    embedding  float16 [V, d]      one row for all tokens with the same hash (`hashed`)
    w_input    float32 [3d, d]     of a gated recurrent unit (GRU): reset, update, candidate
    w_state    float32 [3d, d]
    b_input    float32 [3d]
    b_state    float32 [3d]
    now        float32 [L*E, 2d]   from the state and the last token's embedding to the logits of that token's path
    now_bias   float32 [L*E]
    next       float32 [L*E, d]    from the state alone to the logits of the path of the token after, not yet known
    next_bias  float32 [L*E]

Every token reads all tensors but the embedding, so matrices are kept in memory at 4 bits, with a scale per row.
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
_MOST = 64  # tokens at the end of a prompt's chunk that it follows: it is trained on pieces not much longer


def hashed(ids: NDArray[np.integer[Any]], rows: int) -> NDArray[np.int64]:
    """Returns the embedding row of each token, by multiplicative hashing; `rows` is a power of two."""
    mixed = (ids.astype(np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(33 - int(rows).bit_length())).astype(np.int64)


class PathPredictor:
    """A predictor that follows a text token by token and predicts the paths of its last token and of the one after."""

    def __init__(
        self, tensors: Mapping[str, NDArray[Any]], num_layers: int, num_experts: int
    ) -> None:
        """Args:
        tensors: as in the section, with shapes that fit each other. They are copied.
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
        """Reads a predictor from a section. The result keeps no reference to `content`.

        Raises:
            FormatError: the section is damaged, or belongs to another model.
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
        """Starts a new text."""
        self._seen.fill(0.0)
        self._is_known = [False, False]

    def follow(self, ids: NDArray[np.integer[Any]]) -> None:
        """Takes the next tokens [T] of the text; if there are many, only the last `_MOST`."""
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
        """[L, E]: logits of the last token's path, always in the same array.

        They are computed when first asked for, since that takes longest.
        """
        return self._path(0, self._seen)

    @property
    def next(self) -> Array:
        """[L, E]: logits of the path of the token after the last; likewise."""
        return self._path(1, self._state)

    def _path(self, i: int, seen: Array) -> Array:
        if not self._is_known[i]:
            self._heads[i].dot(seen, self._paths[i].reshape(-1))
            self._is_known[i] = True
        return self._paths[i]


class PathUse(NextUse):
    """`NextUse` mixed with a trained path predictor, which knows the text.

    The mixture weighs the log-odds of `NextUse` ("habit") and the predictor's logits ("text") by two logistic
    regressions that learn while running. One is for the token after the current one, as soon as a layer has run. The
    other is for the token that runs next, for all layers at once, as soon as that token is known.
    """

    def __init__(self, setting: Setting) -> None:
        """Args:
        setting: its `sections` must include the path predictor.

        Raises:
            ValueError: there is no path predictor.
            FormatError: the section is damaged, or belongs to another model.
        """
        L, E = setting.num_layers, setting.num_experts
        if SECTION not in setting.sections:
            raise ValueError(
                "the model's file has no path predictor; edgemoe profile train makes it"
            )
        super().__init__(L, E, setting.experts_per_token)
        self._path = PathPredictor.from_section(setting.sections[SECTION], L, E)
        # Log-odds against use by habit, for the token after the one that a layer ran last; then the features of the
        # layers that are learned from, as they were one token before.
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
        """See `Scheduler.tokens`. It follows one text, and predicts no path while several sequences run at once."""
        if sequences > 1:
            self.begin()
            self._can_learn = self._was_asked = False
            return
        if self._weigh_after.is_next_due:
            self._asked = self._lesson_of(self._path.next)
        self._path.follow(ids)
        _ = self._path.next  # computes the array that `update` reads
        self._can_learn, self._was_asked = self._has_run and len(ids) == 1, False
        self._has_run = True

    def path(self) -> NDArray[np.float64] | None:
        """Returns the log-odds against each expert's use by the token that runs next, [L, E].

        None where none are known: for a prompt, for the first token of a sequence, and for several sequences at once.
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
        """Returns the features [3, n] of the n experts whose layers' turn it is: one, habit, and the logits `text`."""
        layers = slice(self._turns.now.start, self._turns.now.stop)
        habit = self._habit[layers].reshape(-1)
        return np.stack([np.ones_like(habit), habit, text[layers].reshape(-1)])

    def learn(self) -> None:
        """See `NextUse.learn`."""
        super().learn()
        if self._can_learn and self._weigh_after.count_token():
            used = self._now[self._turns.take(), 1].reshape(-1)
            self._weigh_after.learn(self._asked, used)
            if self._was_asked:
                self._weigh_at.learn(self._asked_now, used)
