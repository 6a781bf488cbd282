"""EdgeMoE's table of which experts follow which from layer to layer, learned while running or counted beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.tensors import is_finite, view
from edgemoe.plan import Routing

__all__ = ["Transitions"]


class Transitions:
    """A table of which experts of a layer follow those of the layers before it (EdgeMoE III-C-1).

    With one or two experts per token it is the paper's table. The key is the sorted experts of the two previous layers
    and the value counts what ran next. If that key is new, the key is the experts of one previous layer.

    Larger sets of experts hardly ever repeat. For them, and where both keys are new, the prediction is the mean, over
    the experts of the two previous layers, of what followed each. The last fallback is the layer's own frequencies.
    Both fallbacks are ours: the paper has one expert per token.
    """

    _MOST_PAIRS = 1 << 27  # half a gigabyte per table; 48 layers of 512 experts have a tenth
    _LARGEST = 1 << 12  # keys; from then on the tables of tuples no longer grow

    def __init__(
        self, num_layers: int, num_experts: int, experts_per_token: int, *, depth: int = 2
    ) -> None:
        """Args:
        depth: how many previous layers the mean is over, 1 or 2; there is a table of pairs for each.

        Raises:
            ValueError: the model has too many pairs of experts.
        """
        L, E = num_layers, num_experts
        if L * E * E > self._MOST_PAIRS:
            raise ValueError(
                f"transitions: {L} layers of {E} experts are {L * E * E} pairs; expected at most {self._MOST_PAIRS}"
            )
        self._num_experts, self._experts_per_token = E, experts_per_token
        self._has_tuples = experts_per_token <= 2
        self._tuples: dict[tuple[int, bytes], NDArray[np.float32]] = {}
        self._pairs = np.zeros((L, E, E), np.float32)
        self._far_pairs = np.zeros((L, E, E), np.float32) if depth > 1 else None  # two layers apart
        self._totals = np.zeros((L, E), np.float32)
        self._uses = np.ones((L, E), np.float32)  # at least 1, to divide by
        self._table = _core.PathTable(
            pairs=self._pairs, far=self._far_pairs, totals=self._totals, uses=self._uses
        )
        self._path: list[NDArray[np.int32]] = []
        self._total = np.empty(E, np.float32)

    def update(self, routing: Routing) -> None:
        """Takes one layer's routing. Of several tokens only the last one's path is followed."""
        if routing.layer == 0:
            self._path.clear()
        self._path.append(routing.experts[-1].copy())

    def learn(self) -> None:
        """Called after all layers have run. Counts the path."""
        if len(self._totals) == len(self._path):  # else the path did not begin with the first layer
            self.count(np.array(self._path))

    def count(self, path: NDArray[np.int32]) -> None:
        """Counts the path of a token, int32 [L, K]."""
        self._path = list(path)
        self._table.count(path)
        if self._has_tuples:
            for layer in range(1, len(path)):
                self._count_tuples(layer, path[layer])

    def _count_tuples(self, layer: int, chosen: NDArray[np.int32]) -> None:
        for key in self._keys(layer):
            counts = self._tuples.get(key)
            if counts is None:
                if len(self._tuples) >= self._LARGEST:
                    continue
                counts = self._tuples[key] = np.zeros(self._num_experts, np.float32)
            counts[chosen] += 1.0

    def _keys(self, layer: int) -> Iterator[tuple[int, bytes]]:
        """Yields the path's keys for a layer, the longest first."""
        last = np.sort(self._path[layer - 1]).tobytes()
        if layer > 1:
            yield layer, np.sort(self._path[layer - 2]).tobytes() + last
        yield layer, last

    def predict(self, layer: int) -> NDArray[np.float32]:
        """Returns a score for each expert of the layer after the one just routed, [E]; larger is likelier.

        The array is valid until the next call and is a live view: do not change it.
        """
        marginal: NDArray[np.float32] = self._totals[layer]
        if not 0 < layer == len(self._path):
            return marginal
        if self._has_tuples:
            for key in self._keys(layer):
                counts = self._tuples.get(key)
                if counts is not None:
                    return counts
        before = self._path[layer - 2] if self._far_pairs is not None and layer > 1 else None
        is_known = self._table.follow(layer, self._path[layer - 1], before, self._total)
        return self._total if is_known else marginal

    def state(self) -> dict[str, NDArray[Any]]:
        """See `Scheduler.state`.

        Each key of the tables of tuples is a row: its layer, the experts two layers before (-1 if the key has none),
        and the experts one layer before.
        """
        state = {"transitions.pairs": self._pairs, "transitions.totals": self._totals}
        if self._far_pairs is not None:
            state["transitions.far_pairs"] = self._far_pairs
        if self._tuples:
            K = self._experts_per_token
            keys = np.full((len(self._tuples), 1 + 2 * K), -1, np.float32)
            for row, (layer, experts) in zip(keys, self._tuples, strict=True):
                ids = np.frombuffer(experts, np.int32)
                row[0], row[len(row) - len(ids) :] = layer, ids
            state["transitions.keys"] = keys
            state["transitions.followers"] = np.array(list(self._tuples.values()))
        return state

    def take(self, section: bytes) -> None:
        """Takes the section "transitions" of a file, which `edgemoe profile train --table` makes.

        Args:
            section: a safetensors file of the arrays that `state` returns.

        Raises:
            FormatError: the section is damaged, or belongs to another model.
        """
        L, E, K = *self._totals.shape, self._experts_per_token
        try:
            state, _ = view(section)
            n = len(state["transitions.keys"]) if "transitions.keys" in state else 0
        except (ValueError, TypeError):
            raise FormatError("section transitions: not a table of edgemoe") from None
        shapes = {
            "transitions.pairs": (L, E, E), "transitions.far_pairs": (L, E, E), "transitions.totals": (L, E),
            "transitions.keys": (n, 1 + 2 * K), "transitions.followers": (n, E),
        }  # fmt: skip
        for name, shape in shapes.items():
            if n == 0 and len(shape) == 2 and shape[0] == 0:
                continue
            if name not in state or state[name].shape != shape or not is_finite(state[name]):
                raise FormatError(
                    f"section transitions: expected {name} to be {list(shape)} finite numbers; train it again "
                    "for this model"
                )
        self.restore(state)

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if all(name in state for name in ("transitions.pairs", "transitions.totals")):
            self._pairs[:] = state["transitions.pairs"]
            if self._far_pairs is not None and "transitions.far_pairs" in state:
                self._far_pairs[:] = state["transitions.far_pairs"]
            self._totals[:] = state["transitions.totals"]
            self._uses[:] = np.maximum(self._totals, 1.0)
            self._restore_tuples(state)

    def _restore_tuples(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._tuples.clear()
        keys, counts = state.get("transitions.keys"), state.get("transitions.followers")
        if not self._has_tuples or keys is None or counts is None:
            return
        # Rows that are no keys of this model do no harm: they are never looked up.
        ids = np.clip(keys, -1, self._num_experts + len(self._totals)).astype(np.int32)
        for row, followers in zip(ids[: self._LARGEST], counts, strict=False):
            experts = row[1:][row[1:] >= 0]
            self._tuples[int(row[0]), experts.tobytes()] = followers.astype(np.float32)
