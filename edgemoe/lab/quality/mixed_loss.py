"""The loss of choices of bits for experts, other matrices, and keys and values together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import OutOfBudget
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.loss import log_softmax_rows
from edgemoe.model import KvTypes, Layered
from edgemoe.model.kv_table import Row
from edgemoe.runtime.budget import default_ram, parse_size
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.store import Weight

__all__ = ["Mix", "MixedLoss"]

_STATES = 256 << 20
"""The most bytes of hidden states between layers: 16 choices on 8 windows of 256 tokens, 2,048 wide."""
_SHARE = 8  # hidden states take at most 1 / _SHARE of the memory
_TOKENS = 512  # in one pass: with more, the kernels are no faster

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """A choice of bits for every part of a model."""

    bits: NDArray[np.int8]
    """[L, E]: the bits of experts."""
    rungs: Mapping[str, int]
    """How many rungs each matrix outside the experts has; all, for a matrix that is missing here."""
    kv_rows: tuple[Row, ...]
    """The types of each layer's keys and values; None for a layer without any."""


@dataclass(slots=True)
class _Front:
    """The progress of one window, for mixes that are alike in all layers so far."""

    window: int
    mixes: list[int]
    """The indices of these mixes."""
    x: NDArray[np.float32]
    """[T, D]: the input of the next layer."""


class MixedLoss:
    """An open model that measures choices on the same tokens, layer by layer. A context manager.

    All choices that are measured together go through a layer before any of them goes through the next one. If choices
    are alike up to a layer, these layers are computed once. Choices with the same bits in a layer go through it in one
    batch. Experts are read once for all choices, however little of the model is in memory.

    The second half of each window counts. The reference is the file's highest level with keys and values in float16. It
    is computed when it is first needed, and its log-probabilities stay in memory: N * T/2 * V float32.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        windows: NDArray[np.int32],
        *,
        most: int = 0,
        ram: int | str | None = None,
        threads: int | None = None,
        told: Callable[[int], object] = lambda windows: None,
    ) -> None:
        """Args:
        windows: [N, T], tokens; each row is a sequence of its own.
        most: the most windows that `take` will bring.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: None for the machine's number.
        told: called with the number of windows that have just gone through a layer.

        Raises:
            OutOfBudget: `ram` is too small; the message says the smallest budget that works.
        """
        moe = open_moe(path)
        config, (N, T) = moe.config, windows.shape
        self.windows = windows
        self._told, self._half = told, T // 2
        self._x_bytes: int = 4 * T * config.hidden_size
        self._top = moe.expert_bits
        self._bits = self._top.copy()
        total = default_ram() if ram is None else parse_size(ram)
        self._states: int = max(min(_STATES, total // _SHARE), self._x_bytes)
        # In addition to the references: the logits, and two arrays of their size while log-probabilities are computed.
        beside = self._states + 4 * (T - self._half) * config.vocab_size * (max(N, most) + 3)
        try:
            # The scheduler reads the array of bits at every plan, so it can be changed in place. With "lru" the experts
            # of a layer stay in memory until the next layer's are read.
            model = open_model(
                path,
                EngineOptions(
                    context=T, options={"bits": self._bits, "eviction": "lru", "look_ahead": False},
                    ram=max(total - beside, 1), whole_process=True, threads=threads,
                ),
            ).model  # fmt: skip
        except OutOfBudget as error:
            raise error.beside(beside, "predictions to compare with", ram=total) from None
        self._experts = model.experts
        self._decoder = Layered(
            config, model.weights, model.ops, model.experts,
            max_tokens=model.budget.chunk, context=T, types=KvTypes(),
        )  # fmt: skip
        self._together = max(min(_TOKENS, model.budget.chunk) // T, 1)
        self._logits = np.empty((T - self._half, config.vocab_size), np.float32)
        self._reference: dict[int, NDArray[np.float32]] = {}
        self._shared, self._layers = _by_layer(model.weights, config.num_layers)
        self._head = "embed" if config.tied else "head"

    def take(self, windows: NDArray[np.int32]) -> None:
        """From now on measures on other windows, [N, T] with the same T.

        Raises:
            ValueError: T is another.
        """
        if windows.shape[1] != self.windows.shape[1]:
            raise ValueError(
                f"windows: expected {self.windows.shape[1]} tokens each, got {windows.shape[1]}"
            )
        self.windows = windows
        self._reference.clear()

    def __enter__(self) -> MixedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        """Frees the model and the predictions, whoever still has this object, such as an error's traceback."""
        self._reference.clear()
        del self._experts, self._decoder, self._shared, self._layers, self._logits

    def most(self, windows: int) -> int:
        """Returns how many mixes can go through the layers together on this number of windows."""
        return max(self._states // (self._x_bytes * windows), 1)

    def __call__(self, mixes: Sequence[Mix], which: range | None = None) -> Floats:
        """Returns KL(reference ‖ model) for each token, in nats, [M, windows, T - T // 2].

        Args:
            mixes: M choices.
            which: the indices of the windows to measure on; None for all.
        """
        which = range(len(self.windows)) if which is None else which
        self._refer([i for i in which if i not in self._reference])
        out = np.empty((len(mixes), len(which), len(self._logits)))

        def judge(front: _Front, q: NDArray[np.float32]) -> None:
            p = self._reference[front.window]
            np.subtract(p, q, out=q)  # in place: q is not used elsewhere
            q *= np.exp(p)
            out[front.mixes, which.index(front.window)] = q.sum(1, dtype=np.float64)

        for windows in _pieces(which, self.most(1)):
            for some in _pieces(range(len(mixes)), self.most(len(windows))):
                self._sweep(mixes, some, windows, judge)
        return out

    def _refer(self, windows: Sequence[int]) -> None:
        """Computes the reference's log-probabilities for the second half of windows, [T - T // 2, V] each."""
        specs = self._decoder.config.mixer_by_layer
        plain = tuple(("f16", "f16") if spec.cached_heads[0] else None for spec in specs)
        top = Mix(self._top, {}, plain)

        def keep(front: _Front, q: NDArray[np.float32]) -> None:
            self._reference[front.window] = q

        for some in _pieces(windows, self.most(1)):
            self._sweep([top], [0], some, keep)

    def _sweep(
        self,
        mixes: Sequence[Mix],
        which: Sequence[int],
        windows: Sequence[int],
        done: Callable[[_Front, NDArray[np.float32]], None],
    ) -> None:
        """Runs some of the mixes on some windows through all layers, and calls `done` with the log-probabilities."""
        decoder, fronts = self._decoder, []
        for window in windows:
            x = np.empty((self.windows.shape[1], decoder.config.hidden_size), np.float32)
            decoder.embed(self.windows[window], x)  # always at the highest level
            fronts.append(_Front(window, list(which), x))
        for i in range(decoder.config.num_layers):
            fronts = self._through(i, mixes, fronts)
        while fronts:
            front = fronts.pop()
            for rungs, mine in _alike(front.mixes, lambda m: mixes[m].rungs.get(self._head)):
                decoder.head(
                    front.x[self._half :], _first(self._shared[self._head], rungs), self._logits
                )
                done(_Front(front.window, mine, front.x), log_softmax_rows(self._logits))

    def _through(self, i: int, mixes: Sequence[Mix], fronts: Sequence[_Front]) -> list[_Front]:
        """Runs fronts through layer `i`, and splits those whose mixes differ in it."""
        names, index = self._layers[i], self._decoder.config.moe_index(i)

        def key(m: int) -> tuple[Any, ...]:
            mix = mixes[m]
            bits = mix.bits[index].tobytes() if index >= 0 else b""
            return bits, mix.kv_rows[i], *(mix.rungs.get(name) for name, _ in names.values())

        groups: dict[tuple[Any, ...], list[_Front]] = {}
        for front in fronts:
            parts = _alike(front.mixes, key)
            for n, (of, mine) in enumerate(parts):
                x = front.x if n == len(parts) - 1 else front.x.copy()
                groups.setdefault(of, []).append(_Front(front.window, mine, x))
        for (_, row, *rungs), group in groups.items():
            if index >= 0:
                self._bits[index] = mixes[group[0].mixes[0]].bits[index]
                self._experts.look_again()
            tensors = {
                inner: _first(weight, n)
                for (inner, (_, weight)), n in zip(names.items(), rungs, strict=True)
            }
            version = self._decoder.version(i, tensors, KvTypes(*row) if row else KvTypes())
            for some in _pieces(group, self._together):
                ids = [self.windows[front.window] for front in some]
                self._decoder.run(version, ids, [front.x for front in some])
                self._told(len(some))
        return [front for group in groups.values() for front in group]


def _pieces(of: Sequence[Any], most: int) -> Iterator[Any]:
    """Yields a sequence in pieces of at most `most`."""
    return (of[i : i + most] for i in range(0, len(of), most))


def _alike(which: Sequence[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Groups mixes by a key: returns each key, and the mixes that have it."""
    out: dict[Any, list[int]] = {}
    for m in which:
        out.setdefault(key(m), []).append(m)
    return list(out.items())


def _first(weight: Weight, rungs: int | None) -> Weight:
    """Returns a tensor with only its first rungs; None for all of them, or for a tensor that has no rungs."""
    return weight if rungs is None else cast(Any, weight).first(rungs)


def _by_layer(
    weights: Mapping[str, Weight], num_layers: int
) -> tuple[dict[str, Weight], list[dict[str, tuple[str, Weight]]]]:
    """Returns the tensors outside the layers, by name; and for each layer, by the names within it, the full names and
    tensors."""
    shared: dict[str, Weight] = {}
    layers: list[dict[str, tuple[str, Weight]]] = [{} for _ in range(num_layers)]
    for name, weight in weights.items():
        if name.startswith("layers."):
            _, i, inner = name.split(".", 2)
            layers[int(i)][inner] = name, weight
        else:
            shared[name] = weight
    return shared, layers
