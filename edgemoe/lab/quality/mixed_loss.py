"""Measures what choices of bits cost: experts, the other matrices, and keys and values at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import OutOfBudget
from edgemoe.file.format import open_moe
from edgemoe.lab.quality.loss import log_softmax_rows
from edgemoe.model import KvTypes, Layered
from edgemoe.model.kv_table import Row
from edgemoe.runtime.budget import default_ram, parse_size
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.store import Weight

__all__ = ["Mix", "MixedLoss"]

_STATES = 256 << 20
"""Most bytes of what goes from layer to layer: 16 choices on 8 windows of 256 tokens, 2,048 wide."""
_SHARE = 8  # of the memory, which that takes at most
_TOKENS = 512  # of a pass: with more the kernels are no faster

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Is a choice of bits for everything."""

    bits: NDArray[np.int8]
    """[L, E] of experts."""
    rungs: Mapping[str, int]
    """Of each matrix that is no expert's."""
    kv_rows: tuple[Row, ...]
    """Types of each layer's keys and values."""


@dataclass(slots=True)
class _Front:
    """Is how far a window has come, for mixes that are alike up to there."""

    window: int
    mixes: list[int]
    x: NDArray[np.float32]
    """[T, D], what enters the next layer."""


class MixedLoss:
    """Keeps a model open and measures choices on the same tokens, layer by layer.

    All choices that are measured together go through a layer before any goes through the next one. What they have
    alike up to a layer is computed once; those that have a layer alike go through it in one batch; and experts are read
    once for all of them, however little of the model is in memory. The second half of each window counts. The
    reference, the file's highest level with keys and values in float16, is computed when it is first needed, and stays
    in memory: N * T/2 * V float32.
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
        windows: [N, T] tokens, each a sequence of its own.
        most: windows that `take` will bring at most.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: None for the machine's cores.
        told: is called with how many windows have gone through a layer, each time that some have.

        Raises:
            OutOfBudget: says the smallest budget that works.
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
        # Beside what is kept: the logits, and two arrays like them while log-probabilities are made or judged.
        beside = self._states + 4 * (T - self._half) * config.vocab_size * (max(N, most) + 3)
        try:
            # The scheduler reads the array again at every plan. What a layer reads stays until the next one reads.
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
        """Measures on other windows from now on, [N, T] with the same T."""
        if windows.shape[1] != self.windows.shape[1]:
            raise ValueError(
                f"windows: expected {self.windows.shape[1]} tokens each, got {windows.shape[1]}"
            )
        self.windows = windows
        self._reference.clear()

    def most(self, windows: int) -> int:
        """Returns how many mixes go through the layers together on so many windows."""
        return max(self._states // (self._x_bytes * windows), 1)

    def __call__(self, mixes: Sequence[Mix], which: range | None = None) -> Floats:
        """Returns KL(reference ‖ model) of each token, in nats, [M, windows, T - T // 2].

        Args:
            mixes: M of them.
            which: windows to measure on; None for all.
        """
        which = range(len(self.windows)) if which is None else which
        self._refer([i for i in which if i not in self._reference])
        out = np.empty((len(mixes), len(which), len(self._logits)))

        def judge(front: _Front, q: NDArray[np.float32]) -> None:
            p = self._reference[front.window]
            np.subtract(p, q, out=q)  # in place, as nobody else has it
            q *= np.exp(p)
            out[front.mixes, which.index(front.window)] = q.sum(1, dtype=np.float64)

        for windows in _pieces(which, self.most(1)):
            for some in _pieces(range(len(mixes)), self.most(len(windows))):
                self._sweep(mixes, some, windows, judge)
        return out

    def _refer(self, windows: Sequence[int]) -> None:
        """Keeps the reference's log-probabilities of the second half of windows, [T - T // 2, V] each."""
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
        """Takes some of the mixes on some windows through all layers, and tells the log-probabilities of each."""
        decoder, fronts = self._decoder, []
        for window in windows:
            x = np.empty((self.windows.shape[1], decoder.config.hidden_size), np.float32)
            decoder.embed(self.windows[window], x)  # at the highest level, whatever the head has
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
        """Takes fronts through layer `i`; where mixes differ in it, they part."""
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
    """Cuts a sequence."""
    return (of[i : i + most] for i in range(0, len(of), most))


def _alike(which: Sequence[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Returns each key that there is, and whose it is."""
    out: dict[Any, list[int]] = {}
    for m in which:
        out.setdefault(key(m), []).append(m)
    return list(out.items())


def _first(weight: Weight, rungs: int | None) -> Weight:
    """Returns a tensor with its first rungs; None for all, or for one that has none."""
    return weight if rungs is None else cast(Any, weight).first(rungs)


def _by_layer(
    weights: Mapping[str, Weight], num_layers: int
) -> tuple[dict[str, Weight], list[dict[str, tuple[str, Weight]]]]:
    """Returns what no layer has, by name; and of each layer by the names within it, names and tensors."""
    shared: dict[str, Weight] = {}
    layers: list[dict[str, tuple[str, Weight]]] = [{} for _ in range(num_layers)]
    for name, weight in weights.items():
        if name.startswith("layers."):
            _, i, inner = name.split(".", 2)
            layers[int(i)][inner] = name, weight
        else:
            shared[name] = weight
    return shared, layers
