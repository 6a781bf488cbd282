"""Fits stand-ins: for every expert, the affine map of low rank that is nearest to it on a text.

This is reduced-rank regression. Let X be the expert's inputs, each with a 1 appended, and Y its outputs. Least squares
give B = A^-1 X^T Y, where A is X^T X plus a ridge. Of all maps of rank r the best is B V V^T, where V are the first r
eigenvectors of (X B)^T X B, the products of what B predicts. All of this follows from the sums X^T X and X^T Y. One
pass over the text collects them for as many experts as fit in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import hardware
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.tapped import TappedModel
from edgemoe.plan import Plan
from edgemoe.quant import StandIns
from edgemoe.runtime.budget import default_ram, parse_size

__all__ = ["fit_stand_in", "fit_stand_ins"]

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]

_RIDGE = 0.02  # of the mean square of an input
_MOST_RANK = 64
_MORE = 8  # extra vectors in the subspace iteration, which make the last wanted ones accurate
_ROUNDS = 12  # of subspace iteration


class _Pairs:
    """The sums X^T X and X^T Y of inputs and outputs of some experts. A `Tap`."""

    def __init__(self, moe: MoeFile, which: Sequence[tuple[int, int]]) -> None:
        """Args:
        which: the experts, as (position of the layer among those with experts, expert).
        """
        D = moe.config.hidden_size
        self._at = {pair: i for i, pair in enumerate(which)}
        self.sums: dict[str, NDArray[Any]] = {
            "inputs": np.zeros((len(which), D + 1, D + 1), np.float32),
            "outputs": np.zeros((len(which), D + 1, D), np.float32),
        }

    def dense(self, name: str, x: Array) -> None:
        """See `Tap.dense`."""

    def begin(self, first: int) -> None:
        """See `Tap.begin`."""

    def experts(
        self,
        plan: Plan,
        group: Sequence[int],
        x: Array,
        hidden: Array,
        parts: Array,
        at_level: Callable[[int], Array],
    ) -> None:
        """See `Tap.experts`."""
        for i in group:
            at = self._at.get((plan.layer, int(plan.experts[i])))
            if at is None:
                continue
            rows = slice(plan.offsets[i], plan.offsets[i + 1])
            inputs = np.pad(x[plan.tokens[rows]], ((0, 0), (0, 1)), constant_values=1)
            self.sums["inputs"][at] += inputs.T @ inputs
            self.sums["outputs"][at] += inputs.T @ parts[rows]


def fit_stand_ins(
    path: str | os.PathLike[str],
    windows: NDArray[np.int32],
    rank: int,
    *,
    ram: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> StandIns:
    """Returns stand-ins for all routed experts of a file, fitted at its highest bits.

    Args:
        path: a `.moe` file.
        windows: [N, T], tokens; each row is a text of its own.
        rank: of each map.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: None for the machine's number.
        progress: called with the pieces of text that are done, over all passes, and their number.

    Raises:
        ValueError: the rank is out of range, or the model has no routed experts.
        FormatError, OutOfBudget, OSError: as for `edgemoe.load`.
    """
    moe = open_moe(path)
    L, E, D = len(moe.config.moe_layers), moe.config.num_experts, moe.config.hidden_size
    if not L:
        raise ValueError(f"{path}: has no routed experts")
    most = min(_MOST_RANK, D)
    if not 1 <= rank <= most:
        raise ValueError(f"rank: expected 1 to {most}, got {rank}")
    total_ram = default_ram() if ram is None else parse_size(ram)
    process = hardware.process_bytes()
    each = 4 * (D + 1) * (2 * D + 1)
    at_once = max((total_ram - process) // 2 // each, 1)
    every = [(layer, e) for layer in range(L) for e in range(E)]
    runs = [every[i : i + at_once] for i in range(0, len(every), at_once)]
    up, bias = np.zeros((L, E, rank, D), np.float32), np.zeros((L, E, rank), np.float32)
    down = np.zeros_like(up)
    for i, which in enumerate(runs):
        pairs = _Pairs(moe, which)
        made = 4 * (D + 1) ** 2  # a product, which is computed before it is added
        beside = sum(a.nbytes for a in pairs.sums.values()) + made + 4 * windows.shape[1] * D
        with TappedModel(
            moe, ram=total_ram, process=process, beside=beside, window=windows.shape[1],
            threads=threads,
        ) as model:  # fmt: skip
            x = np.empty((windows.shape[1], D), np.float32)
            for n, ids in enumerate(windows):
                model.embed(ids, x)
                for layer in range(moe.config.num_layers):
                    model.run_layer(layer, ids, x, pairs)
                if progress is not None:
                    progress(i * len(windows) + n + 1, len(runs) * len(windows))
        for at, pair in enumerate(which):
            u, b, d = fit_stand_in(pairs.sums["inputs"][at], pairs.sums["outputs"][at], rank)
            up[pair], bias[pair], down[pair] = u, b, d
    settings: Mapping[str, Any] = {"rank": rank, "tokens": int(windows.size)}
    return StandIns(up=up, bias=bias, down=down, settings=settings)


def fit_stand_in(
    inputs: NDArray[np.floating], outputs: NDArray[np.floating], rank: int
) -> tuple[Array, Array, Array]:
    """Returns up [r, D], bias [r] and down [r, D] of one expert; all zeros for an expert without tokens.

    Args:
        inputs: [D + 1, D + 1], X^T X, where each row of X ends with a 1.
        outputs: [D + 1, D], X^T Y.
        rank: r.
    """
    D = len(inputs) - 1
    if not inputs[D, D] > 0:
        return (
            np.zeros((rank, D), np.float32),
            np.zeros(rank, np.float32),
            np.zeros((rank, D), np.float32),
        )
    a, b = inputs.astype(np.float64), outputs.astype(np.float64)
    np.fill_diagonal(a, a.diagonal() + _RIDGE * a.diagonal().mean())
    full = np.linalg.solve(a, b)
    v = _first(lambda vectors: full.T @ (a @ (full @ vectors)), D, rank)
    first = v @ full.T  # [r, D + 1]
    return (
        first[:, :D].astype(np.float32), first[:, D].astype(np.float32),
        np.ascontiguousarray(v, np.float32),
    )  # fmt: skip


def _first(
    times: Callable[[NDArray[np.float64]], NDArray[np.float64]], n: int, rank: int
) -> NDArray[np.float64]:
    """Returns the first eigenvectors [rank, n] of a symmetric matrix, by subspace iteration from a fixed start."""
    vectors = np.random.default_rng(0).standard_normal((n, min(rank + _MORE, n)))
    for _ in range(_ROUNDS):
        vectors, _ = np.linalg.qr(times(vectors))
    values, turn = np.linalg.eigh(vectors.T @ times(vectors))
    found: NDArray[np.float64] = (vectors @ turn[:, np.argsort(-values)[:rank]]).T
    return found
