"""Divides one dense FFN into experts by its activations, and fits a router to them.

After CMoE (arXiv 2502.04416): the neurons with the largest effect on the output become the shared expert, and the
rest are clustered by the tokens on which they have an effect. CMoE's router fits no standard architecture. Ours is a
linear gate, fitted to the effect of each cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.carve.llama import Array

__all__ = ["Partition", "partition", "require_scipy"]

_ROUNDS = 10
_BLOCK = 2048  # assignment takes cubic time, so more neurons are assigned in random blocks
_RIDGE = 1e-2
_ROUTER_SCALE = 2.0**-8


@dataclass(frozen=True, slots=True)
class Partition:
    """The expert of each neuron of one layer, and the router."""

    labels: NDArray[np.int64]
    """[I]: the expert of each neuron, 0 for the shared one, 1 … E for the routed ones."""
    router: Array
    """[E, D]: router @ x are the logits, so small that softmax is 1 / E within about 1 %."""


def partition(
    x: Array, inner: Array, down: Array, *, num_experts: int, shared: int, seed: int
) -> Partition:
    """Divides the neurons of one layer's FFN.

    Args:
        x: the FFN's input over the calibration tokens [T, D].
        inner: silu(x Wg) * (x Wu), [T, I].
        down: w_down [D, I].
        num_experts: E; must divide I - shared.
        shared: neurons of the shared expert.
        seed: the random seed of the clustering.
    """
    # [T, I]: how far neuron j moves the output for token t.
    impact = np.abs(inner) * np.linalg.norm(down, axis=0)
    np.square(impact, out=impact)
    order = np.argsort(-impact.sum(axis=0), kind="stable")
    routed = np.sort(order[shared:])
    labels = np.zeros(impact.shape[1], np.int64)
    labels[routed] = 1 + _balanced_clusters(
        np.sqrt(impact[:, routed].T), num_experts, np.random.default_rng(seed)
    )
    energy = np.stack(
        [impact[:, labels == e].sum(axis=1) for e in range(1, num_experts + 1)], axis=1
    )
    return Partition(labels, _router(x, np.sqrt(energy)))


def _balanced_clusters(points: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Groups points [N, F] by direction into `count` clusters of equal size; returns labels [N]."""
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = _spread_centres(points, count, rng)
    labels = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        before, labels = labels, _balanced_assignment(points @ centres.T, rng)
        if np.array_equal(before, labels):
            break
        centres = np.stack([points[labels == c].mean(axis=0) for c in range(count)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return labels


def _spread_centres(points: Array, count: int, rng: np.random.Generator) -> Array:
    """Picks `count` rows that are far apart, as k-means++ does."""
    chosen = [int(rng.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, np.maximum(0, 1 - points @ points[chosen[-1]]))
        total = distance.sum()
        weights = distance / total if total > 0 else None
        chosen.append(int(rng.choice(len(points), p=weights)))
    return points[chosen]


def _balanced_assignment(likeness: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """Assigns each row of likeness [N, C] to a column, N / C rows to each, such that the sum is largest.

    With more than `_BLOCK` rows, the sum is maximised within random blocks of rows. Returns labels [N].
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = likeness.shape
    labels = np.empty(rows, np.int64)
    seats = rows // columns
    shuffled = rng.permutation(rows)
    step = max(1, _BLOCK // columns) * columns
    for start in range(0, rows, step):
        block = shuffled[start : start + step]
        cost = np.repeat(-likeness[block], len(block) // columns, axis=1)
        _, seat = linear_sum_assignment(cost)
        labels[block] = seat // (len(block) // columns)
    assert np.all(np.bincount(labels, minlength=columns) == seats)
    return labels


def _router(x: Array, target: Array) -> Array:
    """Fits W [E, D] by ridge regression, so that W x ranks the experts as target [T, E] does."""
    wide = x.astype(np.float64)
    # A token's mean over all experts does not affect the ranking, so it is removed before the fit.
    y = target - target.mean(axis=1, keepdims=True)
    gram = wide.T @ wide
    gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram, wide.T @ y).T
    spread = np.sqrt(np.mean(np.square(wide @ weight.T))) or 1.0
    return np.asarray(weight * (_ROUTER_SCALE / spread), np.float32)


def require_scipy() -> None:
    """Checks that scipy is installed, before minutes of calibration.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "carving without an update needs the package scipy: pip install 'edgemoe[demo]'",
            name="scipy",
        ) from error
